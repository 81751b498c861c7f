// What lives behind an int64 handle: the stable ABI has no classes of one's own.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace fastfreeze {

template <typename T>
class Handles {
 public:
  int64_t add(std::shared_ptr<T> value) {
    std::lock_guard<std::mutex> lock(mutex_);
    values_[++last_] = std::move(value);
    return last_;
  }
  std::shared_ptr<T> get(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(handle);
    STD_TORCH_CHECK(found != values_.end(), "no ", T::kName, " has the handle ", handle);
    return found->second;
  }
  void remove(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    values_.erase(handle);
  }

  // Never destroyed: handles may outlive static destructors.
  static Handles& all() {
    static Handles* handles = new Handles;
    return *handles;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> values_;
  int64_t last_ = 0;
};

}  // namespace fastfreeze
