// A cost as a sum of tables over sizes, as hwprune.ops.CostTables lays it out.
#pragma once

#include <array>
#include <cstdint>

namespace hwprune {

struct CostTables {
  const int64_t* members;    // [axes, most_members], groups that make up an axis
  const float* weights;      // [axes, most_members], elements per unit of the group's ratio; 0 where there is no more
  const float* origin;       // [axes], elements that no group moves
  const float* starts;       // [axes, intervals], ascending, padded with infinity
  const float* per_step;     // [axes, intervals], 1 / length; 0 where there is none
  const int64_t* pair;       // [terms, 2], the axes of a term
  const int64_t* base;       // [terms], its first entry in `flat`
  const int64_t* strides;    // [terms, 2], entries from knot to knot; 0 along an axis of one knot
  const float* flat;         // all tables
  const int64_t* uses;       // [groups, most_uses], slopes that a group moves: 2 * term + (0 or 1)
  const float* use_weights;  // [groups, most_uses], as `weights`
  int64_t axes, most_members, intervals, terms, most_uses;
};

// From the addresses of the arrays and the sizes, in the order above.
inline CostTables cost_tables(const std::array<std::uintptr_t, 11>& arrays, const std::array<int64_t, 5>& sizes) {
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(arrays[i]); };
  const auto integers = [&](int i) { return reinterpret_cast<const int64_t*>(arrays[i]); };
  return {integers(0), floats(1),   floats(2),  floats(3), floats(4), integers(5), integers(6), integers(7),
          floats(8),   integers(9), floats(10), sizes[0],  sizes[1],  sizes[2],    sizes[3],    sizes[4]};
}

}  // namespace hwprune
