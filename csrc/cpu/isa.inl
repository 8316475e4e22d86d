// Every kernel for one instruction set: FASTMIM_ISA names it, FASTMIM_VL is its vector in floats.

namespace fastmim::cpu {
namespace FASTMIM_ISA {

#include "vector.inl"
//
#include "rows.inl"
//
#include "functions.inl"
//
#include "masking.inl"
//
#include "patches.inl"
//
#include "product.inl"
//
#include "attention_item.inl"
//
#include "attention.inl"
#include "loss.inl"
#include "norm.inl"
#include "resample_weights.inl"
//
#include "resample.inl"
#include "tokens.inl"

}  // namespace FASTMIM_ISA
}  // namespace fastmim::cpu

#define FASTMIM_KERNELS(name)            \
  {name,                                 \
   FASTMIM_ISA::random_masking,          \
   FASTMIM_ISA::gather_patches,          \
   FASTMIM_ISA::scatter_patches,         \
   FASTMIM_ISA::pixel_loss,              \
   FASTMIM_ISA::cosine_loss,             \
   FASTMIM_ISA::attention,               \
   FASTMIM_ISA::attention_backward,      \
   FASTMIM_ISA::add_layer_norm,          \
   FASTMIM_ISA::add_layer_norm_backward, \
   FASTMIM_ISA::bias_gelu,               \
   FASTMIM_ISA::bias_gelu_backward,      \
   FASTMIM_ISA::add_row,                 \
   FASTMIM_ISA::add_rows,                \
   FASTMIM_ISA::sum_rows,                \
   FASTMIM_ISA::copy_row,                \
   FASTMIM_ISA::resample}
