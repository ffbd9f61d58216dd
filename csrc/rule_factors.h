// What rules with row and column factors make of sums of squares: arguments and formulas, for host and device. All in
// float64, except the running means, which are float32. No torch header. lomo_kernels/ops/rule_factors.py documents the
// operators.
#pragma once

#include <cmath>

#include "numerics.h"

namespace lomo {

// The sums of all rows, and what their total is added to. `slot` may be null.
struct Total {
  const double* row_sums;
  int64_t count;
  double *slot, *found_inf, *total;
  bool* is_finite;
};

// 1 / (the root of the mean of so many squares + 1e-12), for `count` sums.
struct InverseRMS {
  const double* squares;
  int64_t count;
  double elements;
  double* wide;  // null: `narrow`
  float* narrow;
};

struct AdaLomoFactors {
  const double *row_sums, *column_sums;
  const float *row, *column, *beta;  // `row` is null if the parameter is a vector
  int64_t matrices, rows, columns;   // rows: of each matrix
  double eps;
  float *row_factors, *column_factors, *new_row, *new_column;
};

struct AdaLomoScale {
  double* coef;
  const double *u_squares, *param_squares;
  double elements, clip_threshold, eps;
};

// A state and what may replace it.
struct State {
  float* state;
  const float* from;
  int64_t count;
};

namespace {

LOMO_FN double inverse_rms_of(double squares, double elements) { return 1.0 / (std::sqrt(squares / elements) + 1e-12); }

// NaN stays NaN.
LOMO_FN double at_least(double x, double least) { return x < least ? least : x; }
LOMO_FN double at_most(double x, double most) { return x > most ? most : x; }

LOMO_FN void scale(const AdaLomoScale& a) {
  const double of_param = at_least(std::sqrt(*a.param_squares / a.elements), a.eps);
  const double of_u = at_least(std::sqrt(*a.u_squares / a.elements), a.clip_threshold);
  *a.coef *= of_param / of_u * a.clip_threshold;
}

LOMO_FN void add_total(const Total& a, double total) {
  *a.total = total;
  if (a.slot) *a.slot += total;
  *a.found_inf += 0.0 * total;  // NaN, which is not zero, of infinity and of NaN
  *a.is_finite = *a.found_inf == 0.0;
}

// AdaLomo's running mean after the mean of so many squares.
LOMO_FN float moved(float mean, double squares, double elements, double eps, float beta) {
  constexpr double kLeast = 0x1p-126, kMost = 0x1.fffffep127;  // the normal numbers of float32
  const float now = static_cast<float>(at_most(at_least(squares / elements + eps, kLeast), kMost));
  const float change = mean - now;
  return beta < 0.5f ? now + beta * change : mean - change * (1.0f - beta);
}

LOMO_FN float inverse_root(double x) { return static_cast<float>(1.0 / std::sqrt(x)); }

}  // namespace
}  // namespace lomo
