// What the policy-gradient loss (ppo_loss.cpp) and its backward pass (ppo_loss_backward.cpp) share.
#pragma once

#include <algorithm>

#include "vec.h"


namespace fastllm {

struct PpoColumn {
  Dtype dtype;
  const void* data;  // (tokens,), or (rows,) if by_row; null: absent
  bool by_row;
};

enum PpoVariant : int64_t { ppo, cispo, reinforce };
enum PpoKl : int64_t { k1, k2, k3 };

struct PpoLoss {
  PpoColumn logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs, weights;
  const uint8_t* mask;                                  // (tokens,)
  int64_t tokens;
  float *grad_logprobs, *grad_values, *grad_entropy;    // (tokens,); null: absent
  float lowest, highest;                                // the clip range of a ratio
  float dual_clip, value_clip;                          // dual_clip 0: none
  float value_coef, entropy_coef, kl_coef;
  int64_t kl_estimator, variant;
  bool by_sequence;
};

struct PpoRow {
  float weight;     // of each of its tokens in the sums
  float log_ratio;  // by_sequence: of the sequence
  float slope;      // by_sequence, ppo: the derivative of its losses by the log-ratio of any of its tokens
  float share;      // of each of its tokens in the gradients: the weight over what the loss is divided by
};

// Sums over valid tokens; policy, value, entropy and kl with the rows' weights.
struct PpoSums {
  double count, policy, value, entropy, kl, difference, k3, clipped, value_clipped, ratio, highest, advantages, returns,
      values, errors;
  double spread_returns, spread_errors;  // squared distances from the mean of returns and of errors, returns - values
};

enum PpoAggregation : int64_t { token_mean, seq_mean_token_sum, seq_mean_token_mean, token_sum_norm };

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// The stretches of [at, end) that hold every valid token, of at most so many tokens each, whatever is masked around them left out.
struct PpoStretch {
  const uint8_t* mask;
  int64_t at, end, n = 0;  // the stretch is at .. at + n

  bool next(int64_t most) {
    at += n, n = 0;
    int64_t masked = 0, word;
    for (; at + masked + 8 <= end; masked += 8) {
      std::memcpy(&word, mask + at + masked, 8);
      if (word) break;
    }
    while (at + masked < end && !mask[at + masked]) ++masked;
    if (at + masked == end) return false;
    at += masked / 16 * 16;  // so that aligned tokens stay aligned
    n = std::min(most, end - at);
    for (; n >= 8; n -= 8) {
      std::memcpy(&word, mask + at + n - 8, 8);
      if (word) break;
    }
    while (!mask[at + n - 1]) --n;
    return true;
  }
};

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA
