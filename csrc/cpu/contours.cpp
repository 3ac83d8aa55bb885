// Contours of an edge map: ridges, thinning, and matching one to one with the contours of a truth.
//
// Thinning and matching work on rows of bits, 64 pixels per word, with zeros around the image, so that reads beyond its
// border need no test. Matching is a sparse assignment problem: most pixels take their nearest partner, and shortest
// augmenting paths with prices (Jonker and Volgenant) assign the others.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common.h"
#include "../trace_fast.h"
#include "simd.h"

namespace trace_fast {
namespace {

typedef uint64_t Word;

// The layout of an image in words: its rows, with zeros beside, above and below them.
struct Frame {
  Frame(int64_t height, int64_t width, int64_t reach)
      : height(height),
        width(width),
        border(reach),
        guard(reach / 64 + 1),
        words((width + 63) / 64),
        stride(words + 2 * guard),
        size((height + 2 * border) * stride),
        pixels(height * width) {}

  const int64_t height, width, border, guard, words, stride, size, pixels;
};

// An image of one bit per pixel, in memory of frame.size words.
struct Bits {
  Bits(const Frame& frame, Word* memory)
      : frame(frame), memory(memory), origin(memory + frame.border * frame.stride + frame.guard) {}

  void clear() const { std::memset(memory, 0, frame.size * sizeof(Word)); }
  void copy(const Bits& other) const { std::memcpy(memory, other.memory, frame.size * sizeof(Word)); }
  Word* row(int64_t y) const { return origin + y * frame.stride; }
  bool test(int64_t y, int64_t x) const { return row(y)[x >> 6] >> (x & 63) & 1; }
  void set(int64_t y, int64_t x) const { row(y)[x >> 6] |= Word{1} << (x & 63); }
  void reset(int64_t y, int64_t x) const { row(y)[x >> 6] &= ~(Word{1} << (x & 63)); }

  // Sets the pixels for which inside(index of the pixel) is true, and no others.
  template <class Inside>
  void fill(const Inside& inside) const {
    clear();
    for (int64_t y = 0; y < frame.height; ++y) {
      Word* const to = row(y);
      for (int64_t w = 0; w < frame.words; ++w) {
        const int64_t begin = y * frame.width + 64 * w, count = std::min<int64_t>(64, frame.width - 64 * w);
        Word word = 0;
        for (int64_t i = 0; i < count; ++i) word |= Word{inside(begin + i)} << i;
        to[w] = word;
      }
    }
  }

  // Calls body(y, x) for each pixel that is set, in raster order; body may change this pixel.
  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t y = 0; y < frame.height; ++y)
      for (int64_t w = 0; w < frame.words; ++w)
        for (Word word = row(y)[w]; word; word &= word - 1) body(y, 64 * w + __builtin_ctzll(word));
  }

  const Frame& frame;
  Word* const memory;
  Word* const origin;
};

// Returns the number of bits that are set in the words word(0), word(1), ...
template <class Words>
int64_t count(const Frame& frame, const Words& word) {
  int64_t total = 0;
  for (int64_t i = 0; i < frame.size; ++i) total += __builtin_popcountll(word(i));
  return total;
}

int64_t count(const Bits& bits) {
  return count(bits.frame, [&](int64_t i) { return bits.memory[i]; });
}

// Returns the pixels, among 64, that one pass of Guo and Hall removes, from the rows above, here and below at one word.
// Neighbors are numbered from the east, counterclockwise.
template <bool kSecond>
inline Word removable(const Word* above, const Word* here, const Word* below) {
  const auto east = [](const Word* at) { return at[0] >> 1 | at[1] << 63; };
  const auto west = [](const Word* at) { return at[0] << 1 | at[-1] >> 63; };
  const Word x1 = east(here), x2 = east(above), x3 = above[0], x4 = west(above);
  const Word x5 = west(here), x6 = west(below), x7 = below[0], x8 = east(below);

  // exactly one run of neighbors: the pixel is not a bridge
  const Word b1 = ~x1 & (x2 | x3), b2 = ~x3 & (x4 | x5), b3 = ~x5 & (x6 | x7), b4 = ~x7 & (x8 | x1);
  const Word some = b1 | b2 | b3 | b4;
  const Word several = (b1 & b2) | (b3 & b4) | ((b1 | b2) & (b3 | b4));
  // two or three neighbors, counted in pairs of both kinds: the pixel is neither an end nor inside
  const Word p1 = x1 | x2, p2 = x3 | x4, p3 = x5 | x6, p4 = x7 | x8;
  const Word q1 = x2 | x3, q2 = x4 | x5, q3 = x6 | x7, q4 = x8 | x1;
  const Word two_p = (p1 & p2) | (p3 & p4) | ((p1 | p2) & (p3 | p4));
  const Word two_q = (q1 & q2) | (q3 & q4) | ((q1 | q2) & (q3 | q4));
  const Word inside = p1 & p2 & p3 & p4 & q1 & q2 & q3 & q4;
  // the pixel is not on the side of this pass
  const Word protect = kSecond ? (x6 | x7 | ~x4) & x5 : (x2 | x3 | ~x8) & x1;
  return here[0] & some & ~several & two_p & two_q & ~inside & ~protect;
}

// Thins to lines one pixel wide by passes from alternating sides, until nothing changes. A row is skipped if nothing
// around it has changed since the last pass from the same side.
struct Thinner {
  // the sizes of rows and changes
  static int64_t words(const Frame& frame) { return 2 * frame.stride; }
  static int64_t passes(const Frame& frame) { return frame.height + 2; }

  void thin(const Bits& image) const {
    std::fill_n(changes, passes(frame), 0);
    for (int32_t pass = 1, quiet = 0; quiet < 2; ++pass) quiet = sweep(image, pass) ? 0 : quiet + 1;
  }

  // Runs one pass, and returns whether it changed anything.
  bool sweep(const Bits& image, int32_t pass) const {
    bool changed = false;
    Pace pace;
    Word* above = rows + frame.guard;  // as it was before this pass
    Word* here = above + frame.stride;
    std::memset(rows, 0, words(frame) * sizeof(Word));
    for (int64_t y = 0; y < frame.height; ++y) {
      pace.spend(16 * frame.words);
      Word* const row = image.row(y);
      std::memcpy(here, row, frame.words * sizeof(Word));
      if (std::max({changes[y], changes[y + 1], changes[y + 2]}) >= pass - 2) {
        const Word* const below = row + frame.stride;
        Word removed = 0;
        const auto remove = [&](auto second) {
          for (int64_t w = 0; w < frame.words; ++w) {
            const Word out = removable<decltype(second)::value>(above + w, here + w, below + w);
            row[w] = here[w] & ~out;
            removed |= out;
          }
        };
        pass % 2 ? remove(std::false_type{}) : remove(std::true_type{});
        if (removed) changes[y + 1] = pass, changed = true;
      }
      std::swap(above, here);
    }
    return changed;
  }

  const Frame& frame;
  Word* const rows;
  int32_t* const changes;  // the last pass that changed each row, with one entry more before and after
};

// The pixels within a distance of a pixel: half the width of each row of the disc, and the cost of each pixel.
struct Disc {
  explicit Disc(double distance)
      : reach(static_cast<int64_t>(distance)), side(2 * reach + 1), halves(side), costs(side * side) {
    Pace pace;
    for (int64_t y = -reach; y <= reach; ++y) {
      pace.spend(16 * side);
      int64_t half = -1;
      for (int64_t x = 0; x <= reach && static_cast<double>(y * y + x * x) <= distance * distance; ++x) half = x;
      halves.data[y + reach] = half;
      for (int64_t x = -reach; x <= reach; ++x)
        costs.data[(y + reach) * side + x + reach] = std::lround(std::sqrt(static_cast<double>(y * y + x * x)) * kUnit);
    }
  }

  // Returns the work of a call of find, in the units of Pace.
  int64_t work() const { return 4 * side * (side / 64 + 1); }

  // Calls body(y, x, cost) for each pixel set within the distance until one call returns true; returns whether one did.
  template <class Body>
  bool find(const Bits& bits, int64_t y, int64_t x, const Body& body) const {
    for (int64_t row = std::max<int64_t>(y - reach, 0); row <= std::min(y + reach, bits.frame.height - 1); ++row) {
      const int64_t half = halves.data[row - y + reach], first = x - half, last = x + half;
      const int64_t* const cost = costs.data + (row - y + reach) * side + reach - x;
      for (int64_t w = first >> 6; w <= last >> 6; ++w) {
        Word word = bits.row(row)[w];
        if (w == first >> 6) word &= ~Word{0} << (first & 63);
        if (w == last >> 6) word &= ~Word{0} >> (63 - (last & 63));
        for (; word; word &= word - 1) {
          const int64_t column = 64 * w + __builtin_ctzll(word);
          if (body(row, column, cost[column])) return true;
        }
      }
    }
    return false;
  }

  static constexpr double kUnit = 1 << 16;  // the cost of a distance of one pixel

  const int64_t reach, side;
  Array<int64_t> halves, costs;
};

// A pixel of the second image in an assignment.
struct Column {
  int64_t price;     // never positive, and 0 while there is no partner
  int64_t distance;  // cost of the cheapest path so far, in the last search that reached it
  int32_t partner;   // pixel of the first image, or -1
  int32_t parent;    // the pixel of the first image from which the path comes
  int32_t search;    // the last search that reached it
  int32_t slot;      // its index in the heap
};

// Pairs the pixels of two images within a distance, each pixel in one pair at most: the number of pairs is the largest
// possible and, among all such pairings, the sum of distances is the smallest. The image with fewer pixels is the
// first.
struct Matcher {
  static constexpr int64_t kPlanes = 2, kNumbers = 4;  // arrays of frame.size words, and of one number per pixel

  const Bits& unpaired_a() const { return a_first ? open : left; }
  const Bits& unpaired_b() const { return a_first ? left : open; }

  // Writes the pixels of a and of b that have no partner to unpaired_a() and unpaired_b().
  void match(const Bits& a, const Bits& b) {
    a_first = count(a) <= count(b);
    const Bits& first = a_first ? a : b;
    const Bits& second = a_first ? b : a;
    open.copy(first);
    left.copy(second);
    second.for_each([&](int64_t y, int64_t x) { columns[index(y, x)] = {0, 0, -1, -1, 0, -1}; });

    // the nearest pixel, or a free one among equally near ones; most pixels keep this partner
    int64_t num_waiting = 0;
    Pace pace;
    first.for_each([&](int64_t y, int64_t x) {
      pace.spend(disc.work());
      const int32_t here = index(y, x);
      int64_t nearest = kNever;
      int32_t choice = -1;
      disc.find(second, y, x, [&](int64_t row, int64_t column, int64_t cost) {
        const int32_t there = index(row, column);
        const bool free = columns[there].partner < 0;
        if (cost < nearest)
          nearest = cost, choice = free ? there : -1;
        else if (cost == nearest && free && choice < 0)
          choice = there;
        return false;
      });
      partners[here] = choice;
      if (choice >= 0)
        columns[choice].partner = here;
      else if (nearest < kNever)
        waiting[num_waiting++] = here;
    });
    for (int64_t i = 0; i < num_waiting; ++i) assign(waiting[i], static_cast<int32_t>(i + 1), pace);

    first.for_each([&](int64_t y, int64_t x) {
      if (partners[index(y, x)] >= 0) open.reset(y, x);
    });
    second.for_each([&](int64_t y, int64_t x) {
      if (columns[index(y, x)].partner >= 0) left.reset(y, x);
    });
  }

  // Gives root a partner by the cheapest path, along which others change theirs. If no path leads to a free pixel, one
  // of the pixels on the way stays without a partner for good: the one whose loss costs least.
  void assign(int32_t root, int32_t search, Pace& pace) {
    int64_t heaped = 0, settled = 0, spent = 0, end = kNever;
    int32_t here = root, loser = root, goal = -1;
    for (;;) {
      pace.spend(disc.work() + 64);
      // spent is the cost of the path to here, less the cost of its present partner
      if (kNever - spent < end) end = kNever - spent, loser = here;
      disc.find(left, here / frame.width, here % frame.width, [&](int64_t row, int64_t column, int64_t cost) {
        const int32_t there = index(row, column);
        Column& node = columns[there];
        const int64_t distance = cost - node.price - spent;
        if (node.search != search) {
          node.search = search;
          node.slot = static_cast<int32_t>(heaped++);
        } else if (node.distance <= distance) {
          return false;
        }
        node.distance = distance;
        node.parent = here;
        rise(there);
        return false;
      });
      if (!heaped || columns[heap[0]].distance >= end) break;
      const int32_t next = heap[0];
      if (columns[next].partner < 0) {
        goal = next, end = columns[next].distance;
        break;
      }
      if (--heaped) sink(heap[heaped], heaped);
      left.reset(next / frame.width, next % frame.width);
      done[settled++] = next;
      here = columns[next].partner;
      spent = cost_between(here, next) - columns[next].price - columns[next].distance;
    }
    for (int64_t i = 0; i < settled; ++i) {
      columns[done[i]].price += columns[done[i]].distance - end;
      left.set(done[i] / frame.width, done[i] % frame.width);
    }
    if (goal < 0) {
      goal = partners[loser];
      partners[loser] = -1;
      if (loser == root) return;
    }
    for (;;) {
      const int32_t parent = columns[goal].parent, next = partners[parent];
      partners[parent] = goal;
      columns[goal].partner = parent;
      if (parent == root) return;
      goal = next;
    }
  }

  // Moves a pixel from its slot towards the top of the heap.
  void rise(int32_t pixel) {
    int64_t slot = columns[pixel].slot;
    for (; slot > 0; slot = (slot - 1) / 2) {
      const int32_t above = heap[(slot - 1) / 2];
      if (columns[above].distance <= columns[pixel].distance) break;
      put(above, slot);
    }
    put(pixel, slot);
  }

  // Puts a pixel at the top of the heap and moves it down to its slot.
  void sink(int32_t pixel, int64_t heaped) {
    int64_t slot = 0;
    for (int64_t child; (child = 2 * slot + 1) < heaped; slot = child) {
      if (child + 1 < heaped && columns[heap[child + 1]].distance < columns[heap[child]].distance) ++child;
      if (columns[pixel].distance <= columns[heap[child]].distance) break;
      put(heap[child], slot);
    }
    put(pixel, slot);
  }

  void put(int32_t pixel, int64_t slot) {
    heap[slot] = pixel;
    columns[pixel].slot = static_cast<int32_t>(slot);
  }

  int64_t cost_between(int32_t here, int32_t there) const {
    const int64_t y = there / frame.width - here / frame.width, x = there % frame.width - here % frame.width;
    return disc.costs.data[(y + disc.reach) * disc.side + x + disc.reach];
  }

  int32_t index(int64_t y, int64_t x) const { return static_cast<int32_t>(y * frame.width + x); }

  static constexpr int64_t kNever = int64_t{1} << 50;  // the cost of no partner: more than all distances together

  const Frame& frame;
  const Disc& disc;
  const Bits open,
      left;  // pixels without a partner in the first and second image; in a search, left are those not settled
  Column* const columns;
  int32_t *const partners, *const waiting, *const heap, *const done;
  bool a_first;
};

// Memory of each thread for matching, for thinning and for some images of bits.
struct Workspace {
  Workspace(const Frame& frame, int64_t planes, int num_threads)
      : frame(frame),
        planes(planes),
        words((planes + Matcher::kPlanes) * frame.size * num_threads),
        rows(Thinner::words(frame) * num_threads),
        passes(Thinner::passes(frame) * num_threads),
        columns(frame.pixels * num_threads),
        numbers(Matcher::kNumbers * frame.pixels * num_threads) {}

  Bits plane(int thread, int64_t i) const {
    return Bits(frame, words.data + (thread * (planes + Matcher::kPlanes) + i) * frame.size);
  }

  Thinner thinner(int thread) const {
    return {frame, rows.data + thread * Thinner::words(frame), passes.data + thread * Thinner::passes(frame)};
  }

  Matcher matcher(const Disc& disc, int thread) const {
    const int64_t pixels = frame.pixels;
    const Bits open = plane(thread, planes), left = plane(thread, planes + 1);
    Column* const own = columns.data + thread * pixels;
    int32_t* const own_numbers = numbers.data + thread * Matcher::kNumbers * pixels;
    int32_t *const waiting = own_numbers + pixels, *const heap = waiting + pixels, *const done = heap + pixels;
    return {frame, disc, open, left, own, own_numbers, waiting, heap, done, true};
  }

  const Frame& frame;
  const int64_t planes;
  const Array<Word> words, rows;
  const Array<int32_t> passes;
  const Array<Column> columns;
  const Array<int32_t> numbers;
};

// Smooths by weights 1, 2, .., radius + 1, .., 2, 1 over their sum along both axes; the image is mirrored at its
// border.
void smooth(const float* from, int64_t height, int64_t width, int64_t radius, float* to, int num_threads) {
  const int64_t padded = width + 2 * radius;
  Scratch rows(padded * num_threads);
  const float scale = 1.0f / static_cast<float>((radius + 1) * (radius + 1));
  // ... 2 1 0 | 0 1 2 ...
  const auto mirror = [](int64_t i, int64_t length) {
    i %= 2 * length;
    if (i < 0) i += 2 * length;
    return std::min(i, 2 * length - 1 - i);
  };
  const auto weight = [&](int64_t k) { return static_cast<float>(radius + 1 - std::abs(k)) * scale; };
  parallel_for(height, num_threads, [&](int64_t y, int thread) {
    float* const row = rows.data + thread * padded + radius;
    float* const out = to + y * width;
    std::fill_n(row, width, 0.0f);
    for (int64_t k = -radius; k <= radius; ++k) {
      const float* const source = from + mirror(y + k, height) * width;
      const float share = weight(k);
      for (int64_t x = 0; x < width; ++x) row[x] += share * source[x];
    }
    for (int64_t k = 1; k <= radius; ++k) {
      row[-k] = row[mirror(-k, width)];
      row[width + k - 1] = row[mirror(width + k - 1, width)];
    }
    std::fill_n(out, width, 0.0f);
    for (int64_t k = -radius; k <= radius; ++k) {
      const float share = weight(k);
      for (int64_t x = 0; x < width; ++x) out[x] += share * row[x + k];
    }
  });
}

// Returns half the difference of the neighbors along an axis of length pixels, step apart; the whole one at either end.
inline float slope(const float* at, int64_t i, int64_t length, int64_t step) {
  const int64_t before = i > 0 ? step : 0, after = i + 1 < length ? step : 0;
  return (at[after] - at[-before]) * (before && after ? 0.5f : 1.0f);
}

// Returns the value at a point between pixels; beyond the border, that of the nearest point of the image.
inline float interpolate(const float* image, int64_t height, int64_t width, float y, float x) {
  y = std::min(std::max(y, 0.0f), static_cast<float>(height - 1));
  x = std::min(std::max(x, 0.0f), static_cast<float>(width - 1));
  const int64_t top = static_cast<int64_t>(y), left = static_cast<int64_t>(x);
  const int64_t bottom = std::min(top + 1, height - 1), right = std::min(left + 1, width - 1);
  const float dy = y - static_cast<float>(top), dx = x - static_cast<float>(left);
  const float* const upper = image + top * width;
  const float* const lower = image + bottom * width;
  return (1 - dy) * ((1 - dx) * upper[left] + dx * upper[right]) + dy * ((1 - dx) * lower[left] + dx * lower[right]);
}

// A unit vector across an edge.
struct Normal {
  float y, x;
};

// Returns the direction in which the second derivatives bend the map most, on the ridge of an edge and on its slopes.
inline Normal hessian_normal(float xx, float xy, float yy) {
  // half the angle of (xx - yy, 2 xy) is the direction of the largest second derivative, and the direction of the
  // smallest is perpendicular to it
  const float length = std::sqrt((xx - yy) * (xx - yy) + 4 * xy * xy), sign = xx + yy > 0 ? 1.0f : -1.0f;
  const float cosine = length > 0 ? sign * (xx - yy) / length : 1, sine = length > 0 ? sign * 2 * xy / length : 0;
  return {std::copysign(std::sqrt(std::max(0.0f, 1 - cosine) / 2), sine), std::sqrt(std::max(0.0f, 1 + cosine) / 2)};
}

// Returns the direction of the benchmark of BSDS500, whose tangent is -sign(xy) yy / (xx + 0.00001).
inline Normal bsds_normal(float xx, float xy, float yy) {
  const float x = xx + 1e-5f, y = xy > 0 ? -yy : yy;
  const float length = std::sqrt(x * x + y * y);
  return length > 0 ? Normal{y / length, x / length} : Normal{0, 1};
}

constexpr float kMargin = 1.01f;     // a pixel is suppressed if a neighbor is stronger by this factor
constexpr int64_t kFadedPixels = 5;  // at the border, where detectors are not reliable

void suppress_image(const float* edges, int64_t height, int64_t width, bool like_bsds, float* suppressed,
                    int num_threads) {
  const int64_t size = height * width;
  Scratch strength(size), blurred(size), across(size), down(size);
  smooth(edges, height, width, 1, strength.data, num_threads);
  smooth(like_bsds ? strength.data : edges, height, width, 4, blurred.data, num_threads);
  parallel_for(height, num_threads, [&](int64_t y, int) {
    for (int64_t x = 0; x < width; ++x) {
      const float* const at = blurred.data + y * width + x;
      across.data[y * width + x] = slope(at, x, width, 1);
      down.data[y * width + x] = slope(at, y, height, width);
    }
  });
  const int64_t faded = like_bsds ? std::min({kFadedPixels, height / 2, width / 2}) : 0;
  const auto fade = [&](int64_t i, int64_t length) {
    const int64_t distance = std::min(i, length - 1 - i);
    return distance < faded ? static_cast<float>(distance) / static_cast<float>(faded) : 1.0f;
  };
  parallel_for(height, num_threads, [&](int64_t y, int) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t i = y * width + x;
      const float value = strength.data[i];
      const float xx = slope(across.data + i, x, width, 1), yy = slope(down.data + i, y, height, width);
      const float xy = slope(across.data + i, y, height, width);
      const Normal normal = like_bsds ? bsds_normal(xx, xy, yy) : hessian_normal(xx, xy, yy);
      const float v = static_cast<float>(y), u = static_cast<float>(x);
      const float one = interpolate(strength.data, height, width, v + normal.y, u + normal.x);
      const float other = interpolate(strength.data, height, width, v - normal.y, u - normal.x);
      suppressed[i] = value * kMargin < std::max(one, other) ? 0.0f : value * fade(y, height) * fade(x, width);
    }
  });
}

}  // namespace

template <>
void suppress_nonmaxima<TRACE_FAST_ISA>(const float* edges, int64_t batch, int64_t height, int64_t width,
                                        bool like_bsds, float* suppressed, int num_threads) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t offset = b * height * width;
    suppress_image(edges + offset, height, width, like_bsds, suppressed + offset, num_threads);
  }
}

template <>
void thin<TRACE_FAST_ISA>(const uint8_t* mask, int64_t batch, int64_t height, int64_t width, uint8_t* thinned,
                          int num_threads) {
  const Frame frame(height, width, 1);
  const Array<Word> words((frame.size + Thinner::words(frame)) * num_threads);
  const Array<int32_t> passes(Thinner::passes(frame) * num_threads);
  parallel_for(batch, num_threads, [&](int64_t b, int thread) {
    const uint8_t* const from = mask + b * frame.pixels;
    uint8_t* const to = thinned + b * frame.pixels;
    Word* const own = words.data + thread * (frame.size + Thinner::words(frame));
    const Bits image(frame, own);
    image.fill([&](int64_t i) { return from[i] != 0; });
    Thinner{frame, own + frame.size, passes.data + thread * Thinner::passes(frame)}.thin(image);
    std::fill_n(to, frame.pixels, uint8_t{0});
    image.for_each([&](int64_t y, int64_t x) { to[y * width + x] = 1; });
  });
}

template <>
void match_contours<TRACE_FAST_ISA>(const uint8_t* detected, const uint8_t* truth, int64_t batch, int64_t height,
                                    int64_t width, double distance, uint8_t* matched_detected, uint8_t* matched_truth,
                                    int num_threads) {
  const Disc disc(distance);
  const Frame frame(height, width, std::max<int64_t>(disc.reach, 1));
  const Workspace space(frame, 2, num_threads);
  parallel_for(batch, num_threads, [&](int64_t b, int thread) {
    const Bits detected_bits = space.plane(thread, 0), truth_bits = space.plane(thread, 1);
    detected_bits.fill([&](int64_t i) { return detected[b * frame.pixels + i] != 0; });
    truth_bits.fill([&](int64_t i) { return truth[b * frame.pixels + i] != 0; });
    Matcher matcher = space.matcher(disc, thread);
    matcher.match(detected_bits, truth_bits);
    const auto write = [&](const Bits& image, const Bits& unpaired, uint8_t* to) {
      std::fill_n(to, frame.pixels, uint8_t{0});
      image.for_each([&](int64_t y, int64_t x) { to[y * width + x] = !unpaired.test(y, x); });
    };
    write(detected_bits, matcher.unpaired_a(), matched_detected + b * frame.pixels);
    write(truth_bits, matcher.unpaired_b(), matched_truth + b * frame.pixels);
  });
}

template <>
void count_matches<TRACE_FAST_ISA>(const float* edges, const uint8_t* truths, const uint8_t* ignored,
                                   const uint8_t* groups, const float* thresholds, int64_t annotators, int64_t height,
                                   int64_t width, int64_t num_thresholds, int64_t num_groups, double distance,
                                   bool thinning, int64_t* counts, int64_t* group_counts, int num_threads) {
  const Disc disc(distance);
  const Frame frame(height, width, std::max<int64_t>(disc.reach, 1));
  const auto is_near = [](int64_t, int64_t, int64_t) { return true; };

  // one plane for the contours of each annotator, one for the pixels near any of them, one for the ignored pixels
  const Array<Word> shared((annotators + 2) * frame.size);
  const auto plane = [&](int64_t i) { return Bits(frame, shared.data + i * frame.size); };
  const Bits near_truth = plane(annotators), skipped = plane(annotators + 1);
  int64_t truth_pixels = 0;
  for (int64_t a = 0; a < annotators; ++a) {
    plane(a).fill([&](int64_t i) { return truths[a * frame.pixels + i] != 0; });
    truth_pixels += count(plane(a));
  }
  Pace pace;
  near_truth.fill([&](int64_t i) {
    pace.spend(annotators * disc.work());
    for (int64_t a = 0; a < annotators; ++a)
      if (disc.find(plane(a), i / width, i % width, is_near)) return true;
    return false;
  });
  skipped.fill([&](int64_t i) { return ignored[i] != 0; });

  const Workspace space(frame, 2, num_threads);
  parallel_for(num_thresholds, num_threads, [&](int64_t index, int thread) {
    const Bits detected = space.plane(thread, 0), matched = space.plane(thread, 1);
    const float threshold = thresholds[index];
    Pace own_pace;
    detected.fill([&](int64_t i) { return edges[i] >= threshold; });
    if (thinning) space.thinner(thread).thin(detected);

    int64_t* const row = counts + 6 * index;
    int64_t* const by_group = group_counts + num_groups * index;
    std::fill_n(row, 6, 0);
    std::fill_n(by_group, num_groups, 0);
    matched.clear();
    Matcher matcher = space.matcher(disc, thread);
    for (int64_t a = 0; a < annotators; ++a) {
      matcher.match(detected, plane(a));
      for (int64_t i = 0; i < frame.size; ++i)
        matched.memory[i] |= detected.memory[i] & ~matcher.unpaired_a().memory[i];
      plane(a).for_each([&](int64_t y, int64_t x) {
        own_pace.spend(disc.work());
        row[5] += disc.find(detected, y, x, is_near);
        if (matcher.unpaired_b().test(y, x)) return;
        ++row[0];
        ++by_group[groups[a * frame.pixels + y * width + x]];
      });
    }
    const auto counted = [&](int64_t i) { return matched.memory[i] | (detected.memory[i] & ~skipped.memory[i]); };
    row[1] = truth_pixels;
    row[2] = count(matched);
    row[3] = count(frame, counted);
    row[4] = count(frame, [&](int64_t i) { return counted(i) & near_truth.memory[i]; });
  });
}

}  // namespace trace_fast
