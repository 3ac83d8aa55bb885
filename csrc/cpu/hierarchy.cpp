// Hierarchies of regions: the watershed of an edge map, and the tree in which regions merge by their boundaries.
//
// Strengths are whole numbers, so that sums are exact and do not depend on their order.
#include <cmath>

#include "../common.h"
#include "../trace_fast.h"

namespace trace_fast {
namespace {

// an edge of strength 1
constexpr int32_t kUnit = 1 << 16;

// a slot of a table, or the end of a list
constexpr int32_t kNone = -1;

inline int32_t quantize(float edge) {
  // a comparison with nan is false
  const float clamped = edge > 0 ? (edge < 1 ? edge : 1.0f) : 0.0f;
  return static_cast<int32_t>(std::nearbyint(clamped * kUnit));
}

// Calls body(neighbor) for each pixel beside a pixel, along the axes.
template <class Body>
inline void each_neighbor(int32_t pixel, int32_t height, int32_t width, const Body& body) {
  const int32_t x = pixel % width;
  if (pixel >= width) body(pixel - width);
  if (x > 0) body(pixel - 1);
  if (x + 1 < width) body(pixel + 1);
  if (pixel / width + 1 < height) body(pixel + width);
}

// Labels the plateaus that no lower pixel touches, from 1 in raster order, and all else 0; returns their number.
// queue is scratch memory for all pixels.
int32_t label_minima(const int32_t* heights, int32_t height, int32_t width, int32_t* labels, int32_t* queue) {
  const int32_t pixels = height * width;
  int32_t count = 0;
  Pace pace;
  for (int32_t pixel = 0; pixel < pixels; ++pixel) labels[pixel] = kNone;
  for (int32_t first = 0; first < pixels; ++first) {
    if (labels[first] != kNone) continue;
    int32_t size = 0;
    bool lowest = true;
    queue[size++] = first;
    labels[first] = 0;
    for (int32_t i = 0; i < size; ++i) {
      pace.spend(16);
      each_neighbor(queue[i], height, width, [&](int32_t neighbor) {
        if (heights[neighbor] < heights[first]) lowest = false;
        if (heights[neighbor] != heights[first] || labels[neighbor] != kNone) return;
        labels[neighbor] = 0;
        queue[size++] = neighbor;
      });
    }
    if (!lowest) continue;
    ++count;
    for (int32_t i = 0; i < size; ++i) labels[queue[i]] = count;
  }
  return count;
}

// Writes how many steps each pixel of a plateau that no lower pixel touches is away from its outside, from 1; else 0.
// plateau and queue are scratch memory for all pixels.
void find_depths(const int32_t* heights, int32_t height, int32_t width, int32_t* depths, int32_t* plateau,
                 int32_t* queue) {
  const int32_t pixels = height * width;
  Pace pace;
  for (int32_t pixel = 0; pixel < pixels; ++pixel) depths[pixel] = kNone;
  for (int32_t first = 0; first < pixels; ++first) {
    if (depths[first] != kNone) continue;
    int32_t size = 0, reached = 0;
    bool lowest = true;
    plateau[size++] = first;
    depths[first] = 0;
    for (int32_t i = 0; i < size; ++i) {
      pace.spend(32);
      bool inside = true;
      each_neighbor(plateau[i], height, width, [&](int32_t neighbor) {
        lowest &= heights[neighbor] >= heights[first];
        if (heights[neighbor] != heights[first]) {
          inside = false;
        } else if (depths[neighbor] == kNone) {
          depths[neighbor] = 0;
          plateau[size++] = neighbor;
        }
      });
      if (!inside) queue[reached++] = plateau[i];
    }
    if (!lowest) continue;
    // an image of one plateau has no outside
    if (reached == 0)
      for (; reached < size; ++reached) queue[reached] = plateau[reached];
    for (int32_t i = 0; i < reached; ++i) depths[queue[i]] = 1;
    for (int32_t i = 0; i < reached; ++i)
      each_neighbor(queue[i], height, width, [&](int32_t neighbor) {
        if (heights[neighbor] != heights[first] || depths[neighbor] != 0) return;
        depths[neighbor] = depths[queue[i]] + 1;
        queue[reached++] = neighbor;
      });
  }
}

// Writes the pixels in ascending order of a key from 0 to most, and in the order of from where it is equal.
template <class Key>
void sort_pixels(const int32_t* from, int32_t pixels, int32_t most, int32_t* to, const Key& key) {
  const Array<int32_t> starts(most + 2);
  check_interrupt();
  for (int32_t value = 0; value < most + 2; ++value) starts[value] = 0;
  for (int32_t pixel = 0; pixel < pixels; ++pixel) ++starts[key(pixel) + 1];
  for (int32_t value = 0; value < most; ++value) starts[value + 1] += starts[value];
  for (int32_t i = 0; i < pixels; ++i) to[starts[key(from[i])]++] = from[i];
}

// Floods one image from its minima; returns their number.
int32_t flood_image(const float* edges, int32_t height, int32_t width, int32_t* labels) {
  const int32_t pixels = height * width;
  const Array<int32_t> heights(pixels), depths(pixels), order(pixels), queue(pixels);
  for (int32_t pixel = 0; pixel < pixels; ++pixel) heights[pixel] = quantize(edges[pixel]);
  find_depths(heights.data, height, width, depths.data, order.data, queue.data);

  // heights become ranks, in which the deeper pixels of a minimum are lower
  int32_t deepest = 0;
  for (int32_t pixel = 0; pixel < pixels; ++pixel) {
    if (depths[pixel] > deepest) deepest = depths[pixel];
    order[pixel] = pixel;
  }
  sort_pixels(order.data, pixels, deepest, queue.data, [&](int32_t pixel) { return deepest - depths[pixel]; });
  sort_pixels(queue.data, pixels, kUnit, order.data, [&](int32_t pixel) { return heights[pixel]; });
  for (int32_t i = 0, rank = 0, before = 0, depth = 0; i < pixels; ++i) {
    const int32_t pixel = order[i];
    if (i > 0 && (heights[pixel] != before || depths[pixel] != depth)) ++rank;
    before = heights[pixel], depth = depths[pixel];
    heights[pixel] = rank;
  }
  const int32_t count = label_minima(heights.data, height, width, labels, queue.data);

  Pace pace;
  for (int32_t start = 0, end; start < pixels; start = end) {
    const int32_t level = heights[order[start]];
    // a pixel takes over the label of the lowest one beside it; where it is reached in the present step, its label is
    // below 0, so that no other takes it over
    int32_t size = 0;
    for (end = start; end < pixels && heights[order[end]] == level; ++end) {
      const int32_t pixel = order[end];
      pace.spend(32);
      if (labels[pixel] != 0) continue;
      int32_t label = 0, lowest = level;
      each_neighbor(pixel, height, width, [&](int32_t neighbor) {
        const int32_t rank = heights[neighbor], other = labels[neighbor];
        if (rank > lowest || rank == level || (rank == lowest && other > label)) return;
        lowest = rank, label = other;
      });
      if (label == 0) continue;
      labels[pixel] = -label;
      queue[size++] = pixel;
    }
    for (int32_t reached = 0; reached < size;) {
      const int32_t last = size;
      for (int32_t i = reached; i < last; ++i) labels[queue[i]] = -labels[queue[i]];
      for (; reached < last; ++reached) {
        const int32_t label = labels[queue[reached]];
        each_neighbor(queue[reached], height, width, [&](int32_t neighbor) {
          if (heights[neighbor] != level || labels[neighbor] > 0) return;
          if (labels[neighbor] == 0) queue[size++] = neighbor;
          if (labels[neighbor] == 0 || labels[neighbor] < -label) labels[neighbor] = -label;
        });
      }
    }
  }
  return count;
}

// What two neighboring regions share.
struct Boundary {
  int64_t strength;  // sum over its pairs of pixels
  int64_t pairs;
  double mean;
  int32_t first;       // its first pair in raster order, as a rank
  int32_t regions[2];  // by their slots
  int32_t next[2];     // in the lists of the boundaries of both
  int32_t place;       // in the heap
};

// The boundaries of a partition that merges: found by two regions, listed by one, and in the order in which they go.
class Boundaries {
 public:
  explicit Boundaries(int32_t capacity)
      : boundaries_(capacity), heap_(capacity), mask_(table_size(capacity) - 1), table_(mask_ + 1) {
    for (int64_t slot = 0; slot <= mask_; ++slot) table_[slot] = kNone;
  }

  Boundary& operator[](int32_t index) const { return boundaries_[index]; }
  int32_t count() const { return count_; }
  int32_t weakest() const { return heap_[0]; }

  // Returns the boundary of two regions, which is new if there is none.
  int32_t find_or_add(int32_t a, int32_t b) {
    const int64_t slot = find_slot(a, b);
    if (table_[slot] == kNone) {
      boundaries_[count_] = {0, 0, 0, count_, {a, b}, {kNone, kNone}, kNone};
      table_[slot] = count_++;
    }
    return table_[slot];
  }

  // Orders all boundaries, once they are complete.
  void build_heap() {
    for (int32_t index = 0; index < count_; ++index) {
      boundaries_[index].mean = mean(boundaries_[index]);
      put(size_++, index);
    }
    Pace pace;
    for (int32_t place = size_ / 2 - 1; place >= 0; --place) {
      pace.spend(64);
      sift_down(place);
    }
  }

  // Removes a boundary from the table and the heap.
  void remove(int32_t index) {
    erase_slot(find_slot(boundaries_[index].regions[0], boundaries_[index].regions[1]));
    const int32_t place = boundaries_[index].place, last = heap_[--size_];
    boundaries_[index].place = kNone;
    if (place == size_) return;
    put(place, last);
    restore(place);
  }

  // Lets a boundary of `from` be one of `to`; returns whether it has become part of the one that `to` had.
  bool move(int32_t index, int32_t from, int32_t to) {
    Boundary& boundary = boundaries_[index];
    const int side = boundary.regions[1] == from;
    const int64_t slot = find_slot(to, boundary.regions[1 - side]);
    if (table_[slot] == kNone) {
      erase_slot(find_slot(from, boundary.regions[1 - side]));
      boundary.regions[side] = to;
      table_[find_slot(to, boundary.regions[1 - side])] = index;
      return false;
    }
    const int32_t kept = table_[slot];
    remove(index);
    boundaries_[kept].strength += boundary.strength;
    boundaries_[kept].pairs += boundary.pairs;
    boundaries_[kept].mean = mean(boundaries_[kept]);
    if (boundary.first < boundaries_[kept].first) boundaries_[kept].first = boundary.first;
    restore(boundaries_[kept].place);
    return true;
  }

 private:
  static int64_t table_size(int64_t capacity) {
    int64_t size = 2;
    while (size < 2 * capacity) size *= 2;
    return size;
  }

  static double mean(const Boundary& boundary) {
    return static_cast<double>(boundary.strength) / static_cast<double>(boundary.pairs);
  }

  int64_t home(int32_t a, int32_t b) const {
    const uint64_t low = a < b ? a : b, high = a < b ? b : a;
    uint64_t hash = (low << 32 | high) * 0x9e3779b97f4a7c15;
    return static_cast<int64_t>((hash ^ hash >> 32) & static_cast<uint64_t>(mask_));
  }

  // Returns the slot of the boundary of two regions, or the empty one where it belongs.
  int64_t find_slot(int32_t a, int32_t b) const {
    for (int64_t slot = home(a, b);; slot = (slot + 1) & mask_) {
      if (table_[slot] == kNone) return slot;
      const int32_t* const regions = boundaries_[table_[slot]].regions;
      if ((regions[0] == a && regions[1] == b) || (regions[0] == b && regions[1] == a)) return slot;
    }
  }

  // Empties a slot; those behind it that are not at home move up.
  void erase_slot(int64_t slot) {
    for (int64_t behind = (slot + 1) & mask_; table_[behind] != kNone; behind = (behind + 1) & mask_) {
      const int32_t* const regions = boundaries_[table_[behind]].regions;
      const int64_t distance = (behind - home(regions[0], regions[1])) & mask_;
      if (distance < ((behind - slot) & mask_)) continue;
      table_[slot] = table_[behind];
      slot = behind;
    }
    table_[slot] = kNone;
  }

  bool before(int32_t a, int32_t b) const {
    const Boundary &one = boundaries_[a], &other = boundaries_[b];
    return one.mean < other.mean || (one.mean == other.mean && one.first < other.first);
  }

  void put(int32_t place, int32_t index) {
    heap_[place] = index;
    boundaries_[index].place = place;
  }

  void sift_down(int32_t place) {
    const int32_t index = heap_[place];
    for (;;) {
      int32_t child = 2 * place + 1;
      if (child >= size_) break;
      if (child + 1 < size_ && before(heap_[child + 1], heap_[child])) ++child;
      if (!before(heap_[child], index)) break;
      put(place, heap_[child]);
      place = child;
    }
    put(place, index);
  }

  // Puts right the order of the heap around a place.
  void restore(int32_t place) {
    const int32_t index = heap_[place];
    for (; place > 0 && before(index, heap_[(place - 1) / 2]); place = (place - 1) / 2)
      put(place, heap_[(place - 1) / 2]);
    put(place, index);
    sift_down(place);
  }

  const Array<Boundary> boundaries_;
  const Array<int32_t> heap_;
  const int64_t mask_;
  const Array<int32_t> table_;
  int32_t count_ = 0, size_ = 0;
};

// Calls body(pixel, neighbor) for each pair of pixels of different labels, in raster order, the right one first.
template <class Body>
inline void each_pair(const int32_t* labels, int64_t height, int64_t width, const Body& body) {
  Pace pace;
  for (int64_t y = 0, pixel = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x, ++pixel) {
      pace.spend(16);
      if (x + 1 < width && labels[pixel] != labels[pixel + 1]) body(pixel, pixel + 1);
      if (y + 1 < height && labels[pixel] != labels[pixel + width]) body(pixel, pixel + width);
    }
}

// A region while others merge; it stays at the slot of its part that had the most boundaries.
struct Region {
  int32_t head, tail;  // of its list of boundaries, some of which are gone
  int32_t length;
  int32_t node;
};

}  // namespace

template <>
void watershed<TRACE_FAST_ISA>(const float* edges, int64_t batch, int64_t height, int64_t width, int32_t* labels,
                               int32_t* counts, int num_threads) {
  const int64_t pixels = height * width;
  parallel_for(batch, num_threads, [&](int64_t image, int) {
    counts[image] = flood_image(edges + image * pixels, static_cast<int32_t>(height), static_cast<int32_t>(width),
                                labels + image * pixels);
  });
}

template <>
void merge_tree<TRACE_FAST_ISA>(const int32_t* labels, const float* edges, int64_t height, int64_t width, int64_t count,
                                int32_t* parents, float* levels) {
  int64_t pairs = 0;
  each_pair(labels, height, width, [&](int64_t, int64_t) { ++pairs; });
  Boundaries boundaries(static_cast<int32_t>(pairs));
  const Array<Region> regions(count);
  for (int32_t region = 0; region < count; ++region) regions[region] = {kNone, kNone, 0, region};
  each_pair(labels, height, width, [&](int64_t pixel, int64_t neighbor) {
    const int32_t a = labels[pixel] - 1, b = labels[neighbor] - 1;
    const int32_t one = quantize(edges[pixel]), other = quantize(edges[neighbor]);
    Boundary& boundary = boundaries[boundaries.find_or_add(a, b)];
    boundary.strength += one > other ? one : other;
    boundary.pairs += 1;
  });

  // adds a boundary to the list of one of its regions
  const auto append = [&](Region& region, int32_t slot, int32_t index) {
    boundaries[index].next[boundaries[index].regions[1] == slot] = kNone;
    if (region.head == kNone)
      region.head = index;
    else
      boundaries[region.tail].next[boundaries[region.tail].regions[1] == slot] = index;
    region.tail = index;
    region.length += 1;
  };
  for (int32_t index = 0; index < boundaries.count(); ++index)
    for (const int32_t slot : boundaries[index].regions) append(regions[slot], slot, index);
  boundaries.build_heap();

  Pace pace;
  for (int32_t node = 0; node < count; ++node) levels[node] = 0;
  for (int32_t node = static_cast<int32_t>(count); node < 2 * count - 1; ++node) {
    const int32_t weakest = boundaries.weakest();
    const Boundary shared = boundaries[weakest];
    // the shorter list moves, so that a boundary moves no more often than a logarithm
    const int shorter = regions[shared.regions[1]].length <= regions[shared.regions[0]].length;
    const int32_t from = shared.regions[shorter], to = shared.regions[1 - shorter];
    boundaries.remove(weakest);
    Region &gone = regions[from], &kept = regions[to];
    for (int32_t index = gone.head, next; index != kNone; index = next) {
      pace.spend(256);
      next = boundaries[index].next[boundaries[index].regions[1] == from];
      if (boundaries[index].place != kNone && !boundaries.move(index, from, to)) append(kept, to, index);
    }
    parents[gone.node] = parents[kept.node] = node;
    kept.node = node;
    levels[node] = static_cast<float>(shared.mean / kUnit);
  }
  parents[2 * count - 2] = static_cast<int32_t>(2 * count - 2);
}

}  // namespace trace_fast
