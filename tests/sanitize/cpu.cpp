// Runs every native function of the CPU with several threads, on odd sizes, for AddressSanitizer and ThreadSanitizer to
// watch: make sanitize. Results are compared with those of one thread; whether they are right is for the Python tests.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "cpu/masked_bn_act.hpp"
#include "cpu/masked_conv_product.hpp"
#include "cpu/ratio_update.hpp"

namespace {

using Floats = std::vector<float>;
using Indices = std::vector<int64_t>;

std::mt19937 generator(0);

Floats random_floats(int64_t count, float low = -1.0f, float high = 1.0f) {
  std::uniform_real_distribution<float> uniform(low, high);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = uniform(generator);
  return values;
}

Indices every(int64_t step, int64_t count) {
  Indices found;
  for (int64_t i = step / 2; i < count; i += step) found.push_back(i);
  return found;
}

// `run` writes its results for a number of threads; sums may differ in their rounding.
void check(const char* name, const std::function<Floats(int64_t)>& run) {
  const Floats alone = run(1);
  for (const int64_t threads : {2, 3, 8}) {
    const Floats shared = run(threads);
    for (size_t i = 0; i < alone.size(); ++i) {
      if (std::fabs(alone[i] - shared[i]) <= 1e-4f * (1.0f + std::fabs(alone[i]))) continue;
      std::printf("%s: %g with 1 thread, %g with %d\n", name, alone[i], shared[i], static_cast<int>(threads));
      std::exit(1);
    }
  }
  std::printf("%s\n", name);
}

Floats joined(std::initializer_list<const Floats*> parts) {
  Floats all;
  for (const Floats* part : parts) all.insert(all.end(), part->begin(), part->end());
  return all;
}

void channels(bool last) {
  const int64_t images = 5, width = 67, pixels = 41 * 13, kept = 33;
  const int64_t size = images * width * pixels;
  const Indices index = every(2, width);
  const Floats x = random_floats(size), compact = random_floats(images * kept * pixels), factor = random_floats(kept);
  const Floats a = random_floats(width), b = random_floats(width), residual = random_floats(size);
  Floats mask(static_cast<size_t>(width), 0.0f);
  for (const int64_t i : index) mask[static_cast<size_t>(i)] = 0.5f;
  const auto batch = [&](int64_t threads) { return hwprune::Batch{images, width, pixels, last, threads}; };

  check("gather_channels", [&](int64_t threads) {
    Floats out(compact.size());
    hwprune::gather_channels(x.data(), batch(threads), index.data(), factor.data(), kept, out.data());
    return out;
  });
  check("scatter_channels", [&](int64_t threads) {
    Floats out(x.size()), dots(static_cast<size_t>(kept));
    hwprune::scatter_channels(compact.data(), batch(threads), index.data(), factor.data(), kept, x.data(), out.data(),
                              dots.data());
    return joined({&out, &dots});
  });
  check("epilogue", [&](int64_t threads) {
    Floats y(x.size()), raw(x.size()), dense(x.size());
    const hwprune::Epilogue some{a.data(), b.data(), mask.data(), residual.data(), 0.0f, 6.0f};
    hwprune::epilogue(compact.data(), batch(threads), index.data(), kept, some, y.data(), raw.data());
    const hwprune::Epilogue all{a.data(), b.data(), nullptr, nullptr, 0.0f, HUGE_VALF};
    hwprune::epilogue(x.data(), batch(threads), nullptr, width, all, dense.data(), nullptr);
    return joined({&y, &raw, &dense});
  });
  check("epilogue_backward", [&](int64_t threads) {
    Floats grad_raw(x.size()), grad_residual(x.size()), sum(a.size()), sum_raw(a.size());
    const hwprune::Epilogue args{a.data(), b.data(), mask.data(), residual.data(), 0.0f, 6.0f};
    hwprune::epilogue_backward(residual.data(), x.data(), batch(threads), args, grad_raw.data(), grad_residual.data(),
                               sum.data(), sum_raw.data());
    return joined({&grad_raw, &grad_residual, &sum, &sum_raw});
  });
  check("channel_sums", [&](int64_t threads) {
    Floats sums(a.size()), squares(a.size());
    hwprune::channel_sums(x.data(), batch(threads), sums.data(), squares.data());
    return joined({&sums, &squares});
  });
}

void parts(bool ordered) {
  const int64_t groups = 2, height = 902, width = 147;
  const Indices rows = every(2, height), ascending = every(3, width);
  Indices listed = ascending;
  if (!ordered) std::reverse(listed.begin(), listed.end());
  listed.insert(listed.end(), ascending.begin(), ascending.end());
  const auto row_count = static_cast<int64_t>(rows.size()) / groups * groups;
  const auto count = static_cast<int64_t>(ascending.size());
  const auto args = [&](int64_t threads) {
    return hwprune::Part{width, rows.data(), row_count, listed.data(), count, groups, threads};
  };
  const Floats matrix = random_floats(height * width), part = random_floats(row_count * count);
  const Floats down = random_floats(row_count), across = random_floats(groups * count);
  check("pick_part", [&](int64_t threads) {
    Floats out(part.size());
    hwprune::pick_part(matrix.data(), args(threads), down.data(), across.data(), out.data());
    return out;
  });
  check("spread_part", [&](int64_t threads) {
    Floats out(matrix.size());
    hwprune::spread_part(part.data(), height, args(threads), out.data());
    return out;
  });
}

void columns(bool last) {
  const int64_t images = 5, cin = 19, height = 23, width = 17;
  const Indices listed = every(3, cin * 9);
  const auto count = static_cast<int64_t>(listed.size());
  const int64_t out_height = 12, out_width = 17;  // stride (2, 1), padding 1
  const auto args = [&](int64_t threads) {
    return hwprune::Columns{cin, height, width, out_height, out_width,     3,     2,    1,
                            1,   1,      1,     1,          listed.data(), count, last, threads};
  };
  const Floats x = random_floats(images * cin * height * width);
  const Floats packed = random_floats(images * out_height * out_width * count);
  check("pack_columns", [&](int64_t threads) {
    Floats out(packed.size());
    hwprune::pack_columns(x.data(), images, args(threads), out.data());
    return out;
  });
  check("unpack_columns", [&](int64_t threads) {
    Floats out(x.size());
    hwprune::unpack_columns(packed.data(), images, args(threads), out.data());
    return out;
  });
}

void products(bool last, int64_t lanes) {
  const int64_t images = 5, cin = 37, cout = 29, height = 23, width = 17;
  const Indices listed = every(3, cin * 9);
  Floats in_mask(static_cast<size_t>(cin), 0.0f), out_mask(static_cast<size_t>(cout), 0.0f);
  for (const int64_t i : every(2, cin)) in_mask[static_cast<size_t>(i)] = 0.5f;
  for (const int64_t i : every(2, cout)) out_mask[static_cast<size_t>(i)] = 0.25f;
  const int64_t size = images * cin * height * width, out_size = images * cout * height * width;  // padding 1
  const Floats x = random_floats(size), weight = random_floats(cout * cin * 9), grad = random_floats(out_size);
  const auto args = [&](int64_t threads, bool by_columns) {
    return hwprune::Convolution{images,
                                cin,
                                height,
                                width,
                                cout,
                                height,
                                width,
                                3,
                                3,
                                1,
                                1,
                                1,
                                1,
                                1,
                                1,
                                by_columns ? nullptr : in_mask.data(),
                                out_mask.data(),
                                by_columns ? listed.data() : nullptr,
                                by_columns ? static_cast<int64_t>(listed.size()) : -1,
                                last,
                                last,
                                threads,
                                lanes};
  };
  for (const bool by_columns : {false, true})
    check("convolve", [&](int64_t threads) {
      Floats y(grad.size()), raw(grad.size()), sums(out_mask.size()), squares(out_mask.size());
      const hwprune::Epilogue epilogue{out_mask.data(), nullptr, out_mask.data(), grad.data(), 0.0f, 6.0f};
      hwprune::convolve(x.data(), weight.data(), args(threads, by_columns), epilogue, y.data(), raw.data(), sums.data(),
                        squares.data());
      return joined({&y, &raw, &sums, &squares});
    });
  check("input_gradient", [&](int64_t threads) {
    Floats grad_x(x.size()), grad_mask(in_mask.size());
    hwprune::input_gradient(grad.data(), x.data(), weight.data(), args(threads, false), grad_x.data(),
                            grad_mask.data());
    return joined({&grad_x, &grad_mask});
  });
  check("weight_gradient", [&](int64_t threads) {
    Floats grad_weight(weight.size());
    hwprune::weight_gradient(grad.data(), x.data(), args(threads, false), grad_weight.data());
    return grad_weight;
  });
  check("norm_forward, norm_backward", [&](int64_t threads) {
    const hwprune::Batch batch{images, cin, height * width, last, threads};
    const hwprune::Norm norm{weight.data(), weight.data(), in_mask.data(), nullptr, 1e-5f, 0.0f, HUGE_VALF};
    Floats y(x.size()), mean(in_mask.size()), var(mean), grad_x(x.size()), of_weight(mean), of_bias(mean),
        of_mask(mean), of_residual(x.size());
    hwprune::norm_forward(x.data(), batch, norm, y.data(), mean.data(), var.data());
    hwprune::norm_backward(y.data(), x.data(), batch, norm, mean.data(), var.data(), grad_x.data(), of_weight.data(),
                           of_bias.data(), of_mask.data(), of_residual.data());
    return joined({&y, &mean, &var, &grad_x, &of_weight, &of_bias, &of_mask, &of_residual});
  });
}

void ratios() {
  Indices offsets{0};
  for (int64_t g = 0; g < 40; ++g) offsets.push_back(offsets.back() + 1 + 137 * g);
  const auto groups = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t total = offsets.back();
  const Floats theta = random_floats(groups, -3.0f, 3.0f), importance = random_floats(total, 0.0f, 2.0f);
  const Floats uniforms = random_floats(total, 0.0f, 0.999f), grad_mask = random_floats(total);
  Floats probability;
  for (const float* drawn : {uniforms.data(), static_cast<const float*>(nullptr)})
    check("ratio_forward", [&](int64_t threads) {
      Floats thresholds(theta.size()), p(uniforms.size()), mask(uniforms.size());
      hwprune::ratio_forward({theta.data(), importance.data(), offsets.data(), drawn, thresholds.data(), p.data(),
                              mask.data(), groups, 5.0, 7, threads});
      probability = p;
      return joined({&thresholds, &p, &mask});
    });
  // One axis per group, one table with three knots each.
  Indices members, pair, base, strides, uses;
  Floats flat = random_floats(3 * groups, 0.0f, 1.0f), weights, starts, per_step;
  for (int64_t g = 0; g < groups; ++g) {
    const auto channels = static_cast<float>(offsets[static_cast<size_t>(g) + 1] - offsets[static_cast<size_t>(g)]);
    members.push_back(g);
    weights.push_back(channels);
    starts.insert(starts.end(), {0.0f, channels / 2});
    per_step.insert(per_step.end(), {2 / channels, 2 / channels});
    pair.insert(pair.end(), {g, g});
    base.push_back(3 * g);
    strides.insert(strides.end(), {1, 0});
    uses.push_back(2 * g);
  }
  const Floats origin(theta.size(), 0.0f);
  const hwprune::CostTables tables{members.data(),
                                   weights.data(),
                                   origin.data(),
                                   starts.data(),
                                   per_step.data(),
                                   pair.data(),
                                   base.data(),
                                   strides.data(),
                                   flat.data(),
                                   uses.data(),
                                   weights.data(),
                                   groups,
                                   1,
                                   2,
                                   groups,
                                   1};
  check("table_cost, ratio_step", [&](int64_t threads) {
    Floats cost(1), cost_grad(theta.size()), moved = theta, first(theta.size()), second(theta.size()),
                                             grad(theta.size());
    hwprune::table_cost(tables, theta.data(), groups, cost.data(), cost_grad.data());
    hwprune::ratio_step({grad_mask.data(),
                         probability.data(),
                         offsets.data(),
                         cost_grad.data(),
                         moved.data(),
                         first.data(),
                         second.data(),
                         grad.data(),
                         groups,
                         0.5,
                         1e-4,
                         {0.1, 0.9, 0.99, 1e-8, 1},
                         threads});
    return joined({&cost, &cost_grad, &moved, &grad});
  });
}

}  // namespace

int main() {
  for (const bool last : {false, true}) {
    channels(last);
    columns(last);
    parts(last);
    for (const int64_t lanes : {4, 8, 16}) products(last, lanes);
  }
  ratios();
}
