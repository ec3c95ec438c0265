// What a TensorRT process asks a plugin library for: trtexec --staticPlugins, or load_library of
// the plugin registry.
#include <vector>

#include "tensorrt/node_plugin.h"

#define ADM_RT_EXPORT extern "C" __attribute__((visibility("default")))

ADM_RT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using adm_rt::tensorrt::NodeCreator;
  // Never destroyed: TensorRT may ask for them until the process ends.
  static const auto* creators = [] {
    auto* made = new std::vector<nvinfer1::IPluginCreatorInterface*>;
    for (const auto& node : adm_rt::tensorrt::kNodes) made->push_back(new NodeCreator(node));
    return made;
  }();
  count = static_cast<int32_t>(creators->size());
  return creators->data();
}

ADM_RT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  adm_rt::tensorrt::set_logger_finder(finder);
}
