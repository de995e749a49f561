// SPDX-License-Identifier: Apache-2.0
// The kernels of AMX over a software model of its tiles, for tests on CPUs without them.
#include "attention/tile_flash.hpp"
#include "isa/kernels.hpp"
#include "linear/tile_kernels.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* amx_model_attention_kernels() {
    return make_tile_attention_kernels<TileModel, PortableVector>();
}

const LinearKernels* amx_model_linear_kernels() {
    return make_tile_linear_kernels<TileModel, PortableLines>(portable_linear_kernels());
}

}  // namespace optimum_chatglm_ov
