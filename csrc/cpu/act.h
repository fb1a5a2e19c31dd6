// The activations' codes, as prunekit/ops/activations.py orders them.
#pragma once

namespace prunekit {

enum class Act { silu, gelu, gelu_tanh, relu, relu2 };

}  // namespace prunekit
