// Regions and masks: labeling, flood fill, the random walk between edges, and the merging of masks.
//
// Images of one bit per pixel are rows of 64-bit words with at least one spare bit at the end, which is 0, so that a
// step beyond either end of a row reads 0. A run is a sequence of set bits in a row; runs are numbered in raster order,
// so that the first pixel of a region is that of its first run.
#include "../regions.h"

#include <cmath>
#include <cstdlib>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common.h"
#include "../trace_fast.h"
#include "simd.h"

namespace trace_fast {
namespace {

// images with fewer pixels are finished before another thread has started
constexpr int64_t kWorthThreads = 1 << 19;

// floats in a cache line, and in half of a core's second-level cache
constexpr int64_t kCacheLine = 16, kCached = 1 << 17;

// A list of values of a plain type that grows.
template <class T>
struct List {
  ~List() { std::free(data); }

  void push(T value) {
    if (size == capacity) reserve(2 * capacity + 1024);
    data[size++] = value;
  }

  void reserve(int64_t count) {
    if (count <= capacity) return;
    void* const moved = std::realloc(data, count * sizeof(T));
    if (moved == nullptr) throw std::bad_alloc();
    data = static_cast<T*>(moved);
    capacity = count;
  }

  void swap(List& other) {
    const int64_t sizes[] = {size, capacity};
    T* const values = data;
    size = other.size, capacity = other.capacity, data = other.data;
    other.size = sizes[0], other.capacity = sizes[1], other.data = values;
  }

  T* data = nullptr;
  int64_t size = 0, capacity = 0;
};

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// Returns a word whose lowest count bits are set, at most 64.
inline uint64_t ones(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Returns a bit for each of up to 64 bytes: set if the byte is not 0.
inline uint64_t nonzero(const uint8_t* from, int64_t count) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_maskz_loadu_epi8(ones(count), from);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
#if defined(__AVX2__)
  if (count >= 64) {
    const auto zeros = [&](int64_t at) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
      return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    };
    return ~(zeros(0) | uint64_t{zeros(32)} << 32);
  }
#endif
  uint64_t bits = 0;
  for (int64_t i = 0; i < smaller<int64_t>(count, 64); i += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, from + i, smaller<int64_t>(count - i, 8));
    // the high bit of each byte is set if the byte is not 0, and the product gathers these bits in the top byte
    constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
    bytes = ((bytes & kLow) + kLow) | bytes;
    bits |= (bytes >> 7 & 0x0101010101010101) * 0x0102040810204080 >> 56 << i;
  }
  return bits;
#endif
}

// Returns a bit for each of up to 64 numbers: set if the number is above 0.
inline uint64_t positive(const int32_t* from, int64_t count) {
  uint64_t bits = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < smaller<int64_t>(count, 64); i += 16) {
    const __m512i values = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(ones(count - i)), from + i);
    bits |= uint64_t{_mm512_cmpgt_epi32_mask(values, _mm512_setzero_si512())} << i;
  }
#elif defined(__AVX2__)
  for (; i + 8 <= smaller<int64_t>(count, 64); i += 8) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256 above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(values, _mm256_setzero_si256()));
    bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_ps(above))} << i;
  }
#endif
  for (; i < smaller<int64_t>(count, 64); ++i) bits |= uint64_t{from[i] > 0} << i;
  return bits;
}

// Shifts the words of a row by one pixel, from left to right: each word takes over the last pixel of the word before.
struct Shift {
  uint64_t to_the_right(uint64_t word) {
    const uint64_t moved = word << 1 | before;
    before = word >> 63;
    return moved;
  }

  uint64_t before = 0;
};

// Calls body(first row, end) for strips of an image, on several threads if the image is large enough.
template <class Body>
void for_strips(int64_t height, int64_t width, int num_threads, const Body& body) {
  const int64_t strips = height * width < kWorthThreads ? 1 : smaller<int64_t>(4 * num_threads, height);
  parallel_for(strips, num_threads,
               [&](int64_t strip, int) { body(strip * height / strips, (strip + 1) * height / strips); });
}

// The pixels off the barrier (free), and the regions that they form.
struct Regions {
  Regions(const uint8_t* barrier, int64_t height, int64_t width, bool diagonal, int num_threads);

  const int64_t height, width, words;
  const Array<uint64_t> free;   // (height, words)
  const Array<int32_t> first;   // (height + 1), the first run of each row, and the number of runs
  const Array<int32_t> memory;  // of region, with a margin for whole vectors
  int32_t* const region;        // the region of each run, from 1
  int32_t count = 0;
};

// Unites the runs of a row with the runs above that they touch.
// Runs are widened to the corners of their pixels if corners connect; then two runs touch if they have a bit in common.
// Consecutive common bits belong to one pair of runs up to the next start of a run.
template <bool kDiagonal>
void connect_rows(const uint64_t* above, const uint64_t* row, int64_t words, int32_t above_first, int32_t first,
                  int32_t* parents) {
  Shift above_shift, row_shift, common_shift;
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t above_before = above_shift.to_the_right(above[w]), row_before = row_shift.to_the_right(row[w]);
    const uint64_t above_starts = above[w] & ~above_before, row_starts = row[w] & ~row_before;
    const uint64_t common = kDiagonal ? (above[w] | above_before) & (row[w] | row_before) : above[w] & row[w];
    uint64_t contacts = common & (~common_shift.to_the_right(common) | above_starts | row_starts);
    for (; contacts != 0; contacts &= contacts - 1) {
      const uint64_t until = contacts ^ (contacts - 1);
      const int32_t over = above_first + __builtin_popcountll(above_starts & until) - 1;
      const int32_t run = first + __builtin_popcountll(row_starts & until) - 1;
      // the first contact of a run
      if (parents[run] == run)
        parents[run] = find_root(parents, over);
      else
        unite(parents, over, run);
    }
    above_first += __builtin_popcountll(above_starts);
    first += __builtin_popcountll(row_starts);
  }
}

Regions::Regions(const uint8_t* barrier, int64_t height, int64_t width, bool diagonal, int num_threads)
    : height(height),
      width(width),
      words(width / 64 + 1),
      free(height * words),
      first(height + 1),
      memory(height * ((width + 1) / 2) + 16),
      region(memory.data + 1) {
  expect_writes(memory.data, height * ((width + 1) / 2) * sizeof(int32_t));
  const auto connect = [&](int64_t y) {
    (diagonal ? connect_rows<true> : connect_rows<false>)(&free[(y - 1) * words], &free[y * words], words, first[y - 1],
                                                          first[y], region);
  };

  for_strips(height, width, num_threads, [&](int64_t top, int64_t end) {
    for (int64_t y = top; y < end; ++y) {
      int32_t runs = 0;
      Shift shift;
      for (int64_t w = 0; w < words; ++w) {
        const int64_t inside = width - 64 * w;
        const uint64_t bits = ~nonzero(barrier + y * width + 64 * w, inside) & ones(inside);
        runs += __builtin_popcountll(bits & ~shift.to_the_right(bits));
        free[y * words + w] = bits;
      }
      first[y + 1] = runs;
    }
  });
  first[0] = 0;
  for (int64_t y = 0; y < height; ++y) first[y + 1] += first[y];

  const Array<uint8_t> seams(height);
  for_strips(height, width, num_threads, [&](int64_t top, int64_t end) {
    for (int64_t y = top; y < end; ++y) {
      for (int32_t run = first[y]; run < first[y + 1]; ++run) region[run] = run;
      seams[y] = y == top && y > 0;
      if (y > top) connect(y);
    }
  });
  for (int64_t y = 0; y < height; ++y)
    if (seams[y]) connect(y);

  // parents come before their children, so their regions are already numbered
  for (int32_t run = 0; run < first[height]; ++run) region[run] = region[run] == run ? ++count : region[region[run]];
}

#if defined(__AVX2__)
// For each byte and each of its bits, the number of bits set up to it.
struct Ranks {
  constexpr Ranks() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, rank = 0; bit < 8; ++bit) of[byte][bit] = rank += byte >> bit & 1;
  }
  uint8_t of[256][8];
};
constexpr Ranks kRanks;
#endif

// Writes to each pixel of a row the value of its run, or 0 if it is in none.
// values are those of the runs of the row; they can be read from one before the first to seven after the last.
void write_row(const uint64_t* free, int64_t width, const int32_t* values, int32_t* row) {
  Shift shift;
  const int32_t* value = values - 1;
  for (int64_t x = 0; x < width; x += 64) {
    uint64_t bits = *free++, starts = bits & ~shift.to_the_right(bits);
    int64_t i = x;
    // the whole word is in one run, or in none
    if (starts == 0 && (bits == 0 || bits == ~uint64_t{0}) && x + 64 <= width) {
      const int32_t label = bits == 0 ? 0 : *value;
      for (; i < x + 64; ++i) row[i] = label;
      continue;
    }
#if defined(__AVX2__)
    // each pixel takes one of the eight values from the present run on: its index is the number of runs started so far
    for (; i + 8 <= smaller(x + 64, width); i += 8, bits >>= 8, starts >>= 8) {
      const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value));
      const __m128i ranks = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.of[starts & 255]));
      const __m256i run_values = _mm256_permutevar8x32_epi32(next, _mm256_cvtepu8_epi32(ranks));
      const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
      const __m256i written = _mm256_and_si256(run_values, _mm256_cmpeq_epi32(set, lanes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), written);
      value += __builtin_popcountll(starts & 255);
    }
#endif
    for (; i < smaller(x + 64, width); ++i, bits >>= 1, starts >>= 1) {
      value += starts & 1;
      row[i] = bits & 1 ? *value : 0;
    }
  }
}

// An image over which labels grow.
struct Ground {
  Ground(int32_t* labels, int64_t height, int64_t width)
      : labels(labels), height(height), width(width), pitch(width + 1), memory((height + 2) * pitch + 1) {
    expect_writes(memory.data, (height + 2) * pitch + 1);
    std::memset(row(-1) - 1, 0, pitch + 1);
    for (int64_t y = 0; y < height; ++y) row(y)[width] = 0;
    std::memset(row(height), 0, pitch);
  }

  // Returns a row of bytes, one per pixel: 1 where a label can grow, with zeros all around the image. Bits would take
  // less memory but more time: updates of neighbors in one word depend on each other.
  uint8_t* row(int64_t y) const { return &memory[1 + (y + 1) * pitch]; }

  int32_t* const labels;
  const int64_t height, width, pitch;
  const Array<uint8_t> memory;
};

// the steps to the neighbors of a pixel, those along the axes first
constexpr int kDirections[8][2] = {{-1, 0}, {0, -1}, {0, 1}, {1, 0}, {-1, -1}, {-1, 1}, {1, -1}, {1, 1}};

// how many pixels ahead of the present one to prefetch: the pixels of a front are spread over the image
constexpr int64_t kAhead = 32;

// A row, times 2^32, plus the index in the image of a pixel in this row.
using Position = int64_t;

// A labeled pixel next to pixels over which its label can grow.
struct Seed {
  int32_t label;
  Position position;
};

// Sorts by label, least significant byte first; pixels of the same label stay in order.
void sort(List<Seed>& seeds, List<Seed>& spare) {
  for (int shift = 0; shift < 32; shift += 8) {
    check_interrupt();
    int64_t ends[257] = {};
    const auto byte = [&](int64_t i) { return seeds.data[i].label >> shift & 255; };
    for (int64_t i = 0; i < seeds.size; ++i) ++ends[byte(i) + 1];
    bool sorted = false;
    for (int i = 0; i < 256; ++i) {
      sorted |= ends[i + 1] == seeds.size;
      ends[i + 1] += ends[i];
    }
    if (sorted) continue;
    spare.reserve(seeds.size);
    spare.size = seeds.size;
    for (int64_t i = 0; i < seeds.size; ++i) spare.data[ends[byte(i)]++] = seeds.data[i];
    seeds.swap(spare);
  }
}

// Pixels at the same distance from the seeds, grouped by label.
struct Front {
  struct Group {
    int32_t label;
    int64_t end;
  };

  List<Position> positions;
  List<Group> groups;
};

// Labels the pixels of a front, and moves the open pixels one step further on to the next front.
template <int kSteps>
void advance(const Ground& ground, const Front& front, Front& next) {
  const int64_t width = ground.width, pitch = ground.pitch;
  next.positions.reserve(kSteps * front.positions.size + 1);
  next.groups.size = 0;
  const auto pixel = [&](Position position) { return position & 0xffffffff; };
  const auto byte = [&, open = ground.row(0)](Position position) { return open + pixel(position) + (position >> 32); };
  Position* const positions = next.positions.data;
  int64_t size = 0;
  for (int64_t group = 0, i = 0; group < front.groups.size; ++group) {
    const auto [label, end] = front.groups.data[group];
    for (; i < end; ++i) {
      const Position soon = front.positions.data[smaller(i + kAhead, front.positions.size - 1)];
      __builtin_prefetch(ground.labels + pixel(soon), 1);
      __builtin_prefetch(byte(soon) - pitch, 1);
      __builtin_prefetch(byte(soon) + pitch, 1);

      const Position position = front.positions.data[i];
      ground.labels[pixel(position)] = label;
      for (int step = 0; step < kSteps; ++step) {
        const int64_t dy = kDirections[step][0], dx = kDirections[step][1];
        uint8_t* const open = byte(position) + dy * pitch + dx;
        // there is no branch on open pixels, which could not be predicted
        positions[size] = position + dy * ((int64_t{1} << 32) + width) + dx;
        size += *open;
        *open = 0;
      }
    }
    next.groups.push({label, size});
  }
  next.positions.size = size;
}

// Grows the labels above 0 over the open pixels, whose labels are 0.
// The search is breadth first and starts from pixels in the order of their labels: then the pixels at every distance
// are in this order too, and the first label to reach a pixel is the lowest.
void grow(const Ground& ground, bool diagonal) {
  List<Seed> seeds, spare;
  Pace pace;
  for (int64_t y = 0; y < ground.height; ++y)
    for (int64_t x = 0; x < ground.width; x += 64) {
      pace.spend(64);
      const int64_t inside = ground.width - x;
      uint64_t beside = 0;
      for (int step = 0; step < (diagonal ? 8 : 4); ++step)
        beside |= nonzero(ground.row(y + kDirections[step][0]) + x + kDirections[step][1], inside);
      if (beside == 0) continue;
      const int64_t first = y * ground.width + x;
      for (uint64_t bits = beside & positive(ground.labels + first, inside); bits != 0; bits &= bits - 1) {
        const int64_t pixel = first + __builtin_ctzll(bits);
        seeds.push({ground.labels[pixel], y << 32 | pixel});
      }
    }
  sort(seeds, spare);

  Front front, next;
  for (int64_t i = 0; i < seeds.size; ++i) {
    const auto [label, position] = seeds.data[i];
    front.positions.push(position);
    if (i + 1 == seeds.size || seeds.data[i + 1].label != label) front.groups.push({label, i + 1});
  }
  while (front.positions.size > 0) {
    pace.spend(16 * front.positions.size);
    (diagonal ? advance<8> : advance<4>)(ground, front, next);
    front.positions.swap(next.positions);
    front.groups.swap(next.groups);
  }
}

// Labels the seeds of a row that are off the barrier, and opens the other pixels off the barrier.
void start_row(const int32_t* seeds, const uint8_t* barrier, int64_t width, int32_t* labels, uint8_t* open) {
  for (int64_t x = 0; x < width; ++x) {
    const bool free = barrier[x] == 0, seed = seeds[x] > 0;
    labels[x] = free & seed ? seeds[x] : 0;
    open[x] = free & !seed;
  }
}

// Opens the barrier pixels of a row, and no others.
void open_barrier(const uint8_t* barrier, int64_t width, uint8_t* open) {
  for (int64_t x = 0; x < width; ++x) open[x] = barrier[x] != 0;
}

// Writes the labels of one image; see flood_fill.
void fill(const int32_t* seeds, const uint8_t* barrier, int64_t height, int64_t width, bool diagonal,
          bool claim_barrier, int32_t* labels, int num_threads) {
  const Ground ground(labels, height, width);
  for_strips(height, width, num_threads, [&](int64_t top, int64_t end) {
    for (int64_t y = top; y < end; ++y)
      start_row(seeds + y * width, barrier + y * width, width, labels + y * width, ground.row(y));
  });
  grow(ground, diagonal);
  if (!claim_barrier) return;
  for (int64_t y = 0; y < height; ++y) open_barrier(barrier + y * width, width, ground.row(y));
  grow(ground, diagonal);
}

// masks that are processed together read the affinities once; with two rows each they fit sixteen registers
constexpr int kTogether = 6;

// Floats that are initialized to 0.
struct Zeros : Scratch {
  explicit Zeros(int64_t size) : Scratch(size) { std::memset(data, 0, size * sizeof(float)); }
};

// The walk on one image: for each pixel, the affinities of the steps ahead, to the neighbors that follow it in raster
// order. The affinity of a step back is that of the step ahead from its other end.
//
// Rows of pixels are pitch apart: whole vectors, and as many zeros as a step can exceed a row by, so that a step moves
// by the same distance everywhere. A row of affinities has one such row of pixels for each step ahead, so that the
// affinities of a pixel are close together. Where a step leaves the image its affinity is 0, and the number that is
// read there has no effect.
struct Walk {
  // A pixel that is read by two others, one below the other: offsets, from the upper one, of this pixel and of the
  // affinities of both.
  struct Source {
    int64_t pixel, upper, lower;
  };

  Walk(const float* edges, int64_t height, int64_t width, int64_t radius, double beta);

  bool is_step(int64_t dy, int64_t dx) const { return (dy || dx) && dy * dy + dx * dx < radius * radius; }

  // Calls body(dy, dx) for the steps ahead, in raster order.
  template <class Body>
  void for_ahead(const Body& body) const {
    for (int64_t dy = 0; dy <= reach; ++dy)
      for (int64_t dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx)
        if (is_step(dy, dx)) body(dy, dx);
  }

  // Calls body(index in a mask of this layout, index in the image) for each pixel.
  template <class Body>
  void for_pixels(const Body& body) const {
    Pace pace;
    for (int64_t y = 0; y < height; ++y) {
      pace.spend(16 * width);
      for (int64_t x = 0; x < width; ++x) body(y * pitch + x, y * width + x);
    }
  }

  int64_t count_ahead() const {
    int64_t count = 0;
    for_ahead([&](int64_t, int64_t) { ++count; });
    return count;
  }

  const int64_t height, width, radius, reach, pairs, pitch, stride;  // pairs of rows; stride of rows of affinities
  const int64_t shift, origin, size;  // of a mask: its shift in each step, its upper position, its floats
  const Zeros memory;
  float* const affinities;  // of the first row
  const Zeros degree;       // sums of affinities; 1 between rows
  const Array<Source> sources;
  int64_t both = 0, upper = 0, lower = 0;  // numbers of sources that both rows read, the upper one alone, the lower one
};

// Takes one step of kMasks masks, each of walk.size floats. Rows are read at one position and written at the other,
// walk.shift above or below, in an order in which no row is overwritten that is still to be read.
template <int kMasks>
void step(const Walk& walk, float* masks, bool up) {
  const int64_t pitch = walk.pitch, size = walk.size;
  const float* const from = masks + walk.origin + (up ? walk.shift : 0);
  float* const to = masks + walk.origin + (up ? 0 : walk.shift);
  // how many floats ahead to prefetch at each vector
  const int64_t part = walk.pairs * walk.stride > kCached ? 2 * walk.stride * kLanes / walk.width : 0;
  Pace pace;
  for (int64_t pair = 0; pair < walk.pairs; ++pair) {
    pace.spend(walk.width * (walk.both + walk.upper + walk.lower));
    const int64_t y = 2 * (up ? pair : walk.pairs - 1 - pair);
    for (int64_t x = 0; x < walk.width; x += kLanes) {
      const float* const here = from + y * pitch + x;
      const float* const affinities = walk.affinities + y * walk.stride + x;
      vec upper[kMasks], lower[kMasks];
      for (int mask = 0; mask < kMasks; ++mask) {
        upper[mask] = load(here + mask * size);
        lower[mask] = load(here + mask * size + pitch);
      }
      const Walk::Source* source = walk.sources.data;
      for (const Walk::Source* const end = source + walk.both; source < end; ++source) {
        const vec to_upper = load(affinities + source->upper), to_lower = load(affinities + source->lower);
        for (int mask = 0; mask < kMasks; ++mask) {
          vec value = load(here + mask * size + source->pixel);
          keep(value);
          upper[mask] += to_upper * value;
          lower[mask] += to_lower * value;
        }
      }
      for (const Walk::Source* const end = source + walk.upper; source < end; ++source) {
        const vec to_upper = load(affinities + source->upper);
        for (int mask = 0; mask < kMasks; ++mask) upper[mask] += to_upper * load(here + mask * size + source->pixel);
      }
      for (const Walk::Source* const end = source + walk.lower; source < end; ++source) {
        const vec to_lower = load(affinities + source->lower);
        for (int mask = 0; mask < kMasks; ++mask) lower[mask] += to_lower * load(here + mask * size + source->pixel);
      }
      const float* const degree = walk.degree.data + y * pitch + x;
      const vec upper_degree = load(degree), lower_degree = load(degree + pitch);
      float* const there = to + y * pitch + x;
      for (int mask = 0; mask < kMasks; ++mask) {
        store(there + mask * size, upper[mask] / upper_degree);
        store(there + mask * size + pitch, lower[mask] / lower_degree);
      }
      // the affinities of the next pair of rows, in equal parts
      const float* const next = walk.affinities + (up ? y + 2 : y - 2) * walk.stride + part * (x / kLanes);
      for (int64_t i = 0; i < part; i += kCacheLine) __builtin_prefetch(next + i);
    }
  }
}

using Step = void (*)(const Walk&, float*, bool);
constexpr Step kStep[kTogether] = {step<1>, step<2>, step<3>, step<4>, step<5>, step<6>};

// Returns 1 - edge, the edge clamped to [0, 1].
inline float passing(float edge) { return 1 - (edge < 0 ? 0 : edge > 1 ? 1 : edge); }

Walk::Walk(const float* edges, int64_t height, int64_t width, int64_t radius, double beta)
    : height(height),
      width(width),
      radius(radius),
      reach(radius - 1),
      pairs((height + 1) / 2),
      pitch(round_up(width, kLanes) + reach),
      stride(count_ahead() * pitch),
      shift((reach + 2) * pitch),
      origin(reach * (pitch + 1)),
      size(origin + shift + (2 * pairs + reach) * pitch),
      memory((reach + 2 * pairs) * stride + reach),
      affinities(memory.data + reach * (stride + 1)),
      degree(2 * pairs * pitch),
      sources(4 * radius * radius) {
  // the affinity (1 - the strongest edge of a path)^beta is the lowest power on the path
  const Zeros padded((height + reach) * (pitch + 1));
  float* const powers = padded.data + reach;
  for_pixels([&](int64_t at, int64_t pixel) {
    powers[at] = static_cast<float>(std::pow(static_cast<double>(passing(edges[pixel])), beta));
  });
  const Array<int64_t> offsets(radius * (2 * reach + 1));  // of the steps ahead in a row of affinities
  int64_t offset = 0;
  Pace pace;
  for_ahead([&](int64_t dy, int64_t dx) {
    for (int64_t row = 0; row < height; ++row) {
      pace.spend(width * radius);
      for (int64_t i = 0; i < width; i += kLanes) {
        const float* const from = powers + row * pitch + i;
        vec lowest = load(from);
        for (int64_t y = 0; y <= dy; ++y)
          for (int64_t x = smaller<int64_t>(dx, 0); x <= larger<int64_t>(dx, 0); ++x)
            if (on_path(dy, dx, y, x)) {
              const vec other = load(from + y * pitch + x);
              lowest = other < lowest ? other : lowest;
            }
        store(affinities + row * stride + offset + i, lowest);
      }
    }
    offsets[dy * (2 * reach + 1) + dx + reach] = offset;
    offset += pitch;
  });

  const auto affinity = [&](int64_t dy, int64_t dx) {
    const bool ahead = dy > 0 || (dy == 0 && dx > 0);
    const int64_t offset = offsets[(ahead ? dy : -dy) * (2 * reach + 1) + (ahead ? dx : -dx) + reach];
    return ahead ? offset : offset + dy * stride + dx;
  };
  int64_t num_sources = 0;
  const auto add_sources = [&](bool of_upper, bool of_lower) {
    const int64_t before = num_sources;
    for (int64_t dy = -reach; dy <= reach + 1; ++dy)
      for (int64_t dx = -reach; dx <= reach; ++dx)
        if (is_step(dy, dx) == of_upper && is_step(dy - 1, dx) == of_lower && (of_upper || of_lower))
          sources[num_sources++] = {dy * pitch + dx, of_upper ? affinity(dy, dx) : 0,
                                    of_lower ? stride + affinity(dy - 1, dx) : 0};
    return num_sources - before;
  };
  both = add_sources(true, true);
  upper = add_sources(true, false);
  lower = add_sources(false, true);

  // a step of ones, not divided, sums the affinities in the order in which every step adds up its terms
  const Zeros ones(size);
  for (int64_t i = 0; i < 2 * pairs * pitch; ++i) degree.data[i] = 1;
  for_pixels([&](int64_t at, int64_t) { ones.data[origin + shift + at] = 1; });
  step<1>(*this, ones.data, true);
  for_pixels([&](int64_t at, int64_t) { degree.data[at] = ones.data[origin + at]; });
}

// Writes the masks of one image after the walk; see random_walk.
void walk_image(const float* masks, const float* edges, int64_t count, int64_t height, int64_t width, int64_t radius,
                double beta, int64_t steps, float* walked, int num_threads) {
  const Walk walk(edges, height, width, radius, beta);
  // groups of masks of nearly equal size, enough for all threads
  const int64_t groups = smaller(count, round_up((count + kTogether - 1) / kTogether, num_threads));
  const int64_t most = (count + groups - 1) / groups;
  const Zeros lines(num_threads * most * walk.size);
  parallel_for(groups, num_threads, [&](int64_t group, int thread) {
    const int64_t first = group * count / groups, together = (group + 1) * count / groups - first;
    float* const walking = lines.data + thread * most * walk.size;
    for (int64_t mask = 0; mask < together; ++mask) {
      float* const start = walking + mask * walk.size + walk.origin + walk.shift;
      const float* const from = masks + (first + mask) * height * width;
      walk.for_pixels([&](int64_t at, int64_t pixel) { start[at] = from[pixel] * passing(edges[pixel]); });
    }
    for (int64_t i = 0; i < steps; ++i) {
      check_interrupt();
      kStep[together - 1](walk, walking, i % 2 == 0);
    }
    for (int64_t mask = 0; mask < together; ++mask) {
      const float* const end = walking + mask * walk.size + walk.origin + (steps % 2 == 0 ? walk.shift : 0);
      float* const to = walked + (first + mask) * height * width;
      walk.for_pixels([&](int64_t at, int64_t pixel) { to[pixel] = end[at]; });
    }
  });
}

// Masks of one bit per pixel, without spare bits, and the extent of each.
struct Masks {
  struct Extent {
    int64_t pixels, top, end, left, right;  // rows [top, end), words [left, right)
  };

  Masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width, int num_threads)
      : height(height), words((width + 63) / 64), bits(count * height * words), extents(count) {
    parallel_for(count, num_threads, [&](int64_t mask, int) {
      Extent extent = {0, height, 0, words, 0};
      for (int64_t y = 0; y < height; ++y)
        for (int64_t w = 0; w < words; ++w) {
          const uint64_t word = nonzero(masks + (mask * height + y) * width + 64 * w, width - 64 * w);
          row(mask, y)[w] = word;
          if (word == 0) continue;
          extent.pixels += __builtin_popcountll(word);
          extent.top = smaller(extent.top, y), extent.end = y + 1;
          extent.left = smaller(extent.left, w), extent.right = larger(extent.right, w + 1);
        }
      extents[mask] = extent;
    });
  }

  uint64_t* row(int64_t mask, int64_t y) const { return &bits[(mask * height + y) * words]; }

  // Returns whether the IoU of two masks is above iou.
  bool overlap(int64_t mask, int64_t other, double iou) const {
    const Extent &one = extents[mask], &two = extents[other];
    const int64_t top = larger(one.top, two.top), end = smaller(one.end, two.end);
    const int64_t left = larger(one.left, two.left), right = smaller(one.right, two.right);
    if (top >= end || left >= right) return false;
    // they share at most the pixels of the smaller one, and at most those in both extents
    const int64_t most = smaller(smaller(one.pixels, two.pixels), 64 * (end - top) * (right - left));
    if (!trace_fast::overlap(most, one.pixels, two.pixels, iou)) return false;
    int64_t shared = 0;
    for (int64_t y = top; y < end; ++y) {
      const uint64_t *const here = row(mask, y), *const there = row(other, y);
      for (int64_t w = left; w < right; ++w) shared += __builtin_popcountll(here[w] & there[w]);
    }
    return trace_fast::overlap(shared, one.pixels, two.pixels, iou);
  }

  // Adds the pixels of another mask to a mask.
  void add(int64_t mask, int64_t other) {
    Extent& extent = extents[mask];
    const Extent& more = extents[other];
    for (int64_t y = more.top; y < more.end; ++y) {
      uint64_t *const here = row(mask, y), *const there = row(other, y);
      for (int64_t w = more.left; w < more.right; ++w) {
        extent.pixels += __builtin_popcountll(there[w] & ~here[w]);
        here[w] |= there[w];
      }
    }
    extent.top = smaller(extent.top, more.top), extent.end = larger(extent.end, more.end);
    extent.left = smaller(extent.left, more.left), extent.right = larger(extent.right, more.right);
  }

  const int64_t height, words;
  const Array<uint64_t> bits;   // (count, height, words)
  const Array<Extent> extents;  // (count)
};

}  // namespace

template <>
void label_regions<TRACE_FAST_ISA>(const uint8_t* barrier, int64_t batch, int64_t height, int64_t width, bool diagonal,
                                   int32_t* labels, int32_t* counts, int num_threads) {
  expect_writes(labels, batch * height * width * sizeof(int32_t));
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t offset = image * height * width;
    const Regions regions(barrier + offset, height, width, diagonal, num_threads);
    counts[image] = regions.count;
    for_strips(height, width, num_threads, [&](int64_t top, int64_t end) {
      for (int64_t y = top; y < end; ++y)
        write_row(&regions.free[y * regions.words], width, regions.region + regions.first[y],
                  labels + offset + y * width);
    });
  }
}

template <>
void flood_fill<TRACE_FAST_ISA>(const int32_t* seeds, const uint8_t* barrier, int64_t batch, int64_t height,
                                int64_t width, bool diagonal, bool claim_barrier, int32_t* labels, int num_threads) {
  expect_writes(labels, batch * height * width * sizeof(int32_t));
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t offset = image * height * width;
    fill(seeds + offset, barrier + offset, height, width, diagonal, claim_barrier, labels + offset, num_threads);
  }
}

template <>
void random_walk<TRACE_FAST_ISA>(const float* masks, const float* edges, int64_t batch, int64_t count, int64_t height,
                                 int64_t width, int64_t radius, double beta, int64_t steps, float* walked,
                                 int num_threads) {
  if (count == 0) return;
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t pixels = height * width, offset = image * count * pixels;
    walk_image(masks + offset, edges + image * pixels, count, height, width, radius, beta, steps, walked + offset,
               num_threads);
  }
}

template <>
void merge_masks<TRACE_FAST_ISA>(const uint8_t* masks, int64_t count, int64_t height, int64_t width, double iou,
                                 int64_t* groups, int num_threads) {
  Masks unions(masks, count, height, width, num_threads);
  const int64_t words = count / 64 + 1;
  const Array<uint64_t> overlaps(count * words);  // the later unions that each union overlaps
  const Array<int32_t> parents(count), roots(count);
  const Array<uint8_t> grown(count);  // in the last round: the overlap of two others is unchanged
  for (int64_t mask = 0; mask < count; ++mask) {
    parents[mask] = roots[mask] = static_cast<int32_t>(mask);
    grown[mask] = 1;
  }

  for (bool merging = count > 0; merging;) {
    parallel_for(count, num_threads, [&](int64_t mask, int) {
      for (int64_t w = 0; w < words; ++w) overlaps[mask * words + w] = 0;
      if (roots[mask] != mask) return;
      for (int64_t other = mask + 1; other < count; ++other)
        if (roots[other] == other && (grown[mask] || grown[other]) && unions.overlap(mask, other, iou))
          overlaps[mask * words + other / 64] |= uint64_t{1} << other % 64;
    });
    for (int64_t mask = 0; mask < count; ++mask)
      for (int64_t w = 0; w < words; ++w)
        for (uint64_t bits = overlaps[mask * words + w]; bits != 0; bits &= bits - 1)
          unite(parents.data, static_cast<int32_t>(mask), static_cast<int32_t>(64 * w + __builtin_ctzll(bits)));

    for (int64_t mask = 0; mask < count; ++mask) parents[mask] = find_root(parents.data, static_cast<int32_t>(mask));

    // each union takes over the unions that were linked to it in this round
    parallel_for(count, num_threads, [&](int64_t mask, int) {
      grown[mask] = 0;
      if (parents[mask] != mask) return;
      for (int64_t other = mask + 1; other < count; ++other)
        if (roots[other] == other && parents[other] == mask) {
          check_interrupt();
          unions.add(mask, other);
          grown[mask] = 1;
        }
    });
    merging = false;
    for (int64_t mask = 0; mask < count; ++mask) {
      roots[mask] = parents[mask];
      merging |= grown[mask];
    }
  }

  int64_t num_groups = 0;
  for (int64_t mask = 0; mask < count; ++mask) groups[mask] = roots[mask] == mask ? num_groups++ : groups[roots[mask]];
}

template <>
void unite_masks<TRACE_FAST_ISA>(const uint8_t* masks, const int64_t* groups, int64_t count, int64_t pixels,
                                 int64_t unions, uint8_t* merged, int num_threads) {
  expect_writes(merged, unions * pixels);
  parallel_for(unions, num_threads, [&](int64_t group, int) {
    uint8_t* const united = merged + group * pixels;
    bool first = true;
    for (int64_t mask = 0; mask < count; ++mask) {
      if (groups[mask] != group) continue;
      check_interrupt();
      const uint8_t* const from = masks + mask * pixels;
      if (first)
        std::memcpy(united, from, pixels);
      else
        for (int64_t i = 0; i < pixels; ++i) united[i] |= from[i];
      first = false;
    }
  });
}

}  // namespace trace_fast
