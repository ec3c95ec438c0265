// adm_rt._cuda.guided_mean_update: the step on CUDA, with coefficients by value or from a table.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bind_guided_mean_update.h"
#include "ops/guided_mean_update_cuda.h"

namespace py = pybind11;

namespace {

using adm_rt::GuidedMeanUpdateCuda;
// address, channels, dtype code
using Copy = std::tuple<uintptr_t, int64_t, int>;

}  // namespace

void bind_cuda_guided_mean_update(py::module_& module) {
  module.def(
      "guided_mean_update",
      guided_mean_update_binding<uintptr_t, uintptr_t>(
          [](const adm_rt::GuidedMeanUpdateParams& params, uintptr_t limits, uintptr_t stream) {
            GuidedMeanUpdateCuda cuda;
            cuda.limits = reinterpret_cast<float*>(limits);
            adm_rt::guided_mean_update_cuda(params, cuda, reinterpret_cast<void*>(stream));
          }),
      "As _C.guided_mean_update, then limits: float32 [images] scratch, and the stream. Here "
      "model_output, uncond_output and gradient may be float16 too.");
  module.def(
      "guided_mean_update_step",
      guided_mean_update_binding<std::array<uintptr_t, 4>, std::array<bool, 2>, std::vector<Copy>,
                                 uintptr_t, uintptr_t>(
          [](const adm_rt::GuidedMeanUpdateParams& params, const std::array<uintptr_t, 4>& device,
             const std::array<bool, 2>& by_pixels, const std::vector<Copy>& copies, uintptr_t image,
             uintptr_t stream) {
            ADM_RT_CHECK(copies.size() <= 2, "guided_mean_update: ", copies.size(),
                         " copies; at most 2");
            GuidedMeanUpdateCuda cuda;
            cuda.table = reinterpret_cast<const float*>(device[0]);
            cuda.step_counter = reinterpret_cast<uint32_t*>(device[1]);
            cuda.arrivals = reinterpret_cast<uint32_t*>(device[2]);
            cuda.limits = reinterpret_cast<float*>(device[3]);
            cuda.pixel_major.model_output = by_pixels[0];
            cuda.pixel_major.gradient = by_pixels[1];
            for (size_t k = 0; k < copies.size(); ++k) {
              const auto& [address, channels, dtype] = copies[k];
              cuda.pixel_major.copies[k].data = reinterpret_cast<void*>(address);
              cuda.pixel_major.copies[k].channels = channels;
              cuda.pixel_major.copies[k].dtype = adm_rt::dtype_from_int(dtype);
            }
            cuda.pixel_major.image = reinterpret_cast<uint8_t*>(image);
            adm_rt::guided_mean_update_cuda(params, cuda, reinterpret_cast<void*>(stream));
          }),
      "For captured graphs. As _C.guided_mean_update, then\n"
      " device: (table float32 [steps, 18], step_counter uint32 [1], arrivals uint32 [1], limits "
      "float32 [images]): the row and the noise's step come from the table and the counter, not "
      "from the arguments (both 0: from the arguments); with arrivals, zero at first, the kernel "
      "advances the counter; limits for dynamic clipping,\n"
      " by_pixels: (model outputs, gradient): whether they are [images, pixels, channels],\n"
      " copies: up to two (address, channels, dtype code 1 or 2): x_next into the first channels "
      "of "
      "[images, pixels, channels],\n"
      " image: uint8 [images, pixels, channels], x_next as pixels, or 0; stream.");
}
