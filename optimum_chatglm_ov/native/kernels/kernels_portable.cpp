// SPDX-License-Identifier: Apache-2.0
#include "dot_products.hpp"
#include "flash.hpp"
#include "tile_products.hpp"

namespace optimum_chatglm_ov {

const Kernels* portable_kernels() {
    return make_kernels<DotProducts<F32Dot<PortableVector>>, PortableVector>("portable");
}

const Kernels* amx_model_kernels() {
    return make_kernels<TileProducts<TileModel>, PortableVector>("amx-model");
}

}  // namespace optimum_chatglm_ov
