// A device: its memory, and one in-order queue of work (but see SideBySide).
//
// Every kernel call and every copy is queued on the device's one queue and runs in the order of the
// calls; only Download(), Synchronize() and Readback::Wait() wait. A Device is used by one thread
// at a time.
//
// Two libraries implement this header, kernels/cpu and kernels/cuda; a program links exactly one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace gla {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr const char* NameOf(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

struct DeviceOptions {
  int ordinal = 0;      // which GPU; the CPU backend has only 0
  int num_threads = 0;  // CPU backend: threads that compute, 0 = one per core; ignored by CUDA
  bool poison = false;  // fill every allocation with NaN, so that a read of stale memory shows
};

class Device {
 public:
  // The device, or null and the reason in `*error` (no driver, no GPU, no such ordinal).
  static std::unique_ptr<Device> Open(const DeviceOptions& options, std::string* error);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // At least 256-byte aligned; contents undefined (NaN with `poison`). Null when there is no room.
  void* Allocate(size_t bytes);
  void Free(void* memory);  // null is allowed; waits until queued work that may use it is done

  void Upload(void* device_dst, const void* host_src,
              size_t bytes);  // `host_src` is free on return
  void Download(void* host_dst, const void* device_src, size_t bytes);  // waits
  void Copy(void* device_dst, const void* device_src, size_t bytes);
  void Fill(void* device_dst, int byte, size_t bytes);
  void Synchronize();
  // Queues first() and second(), which may run at the same time: neither may use what the other
  // writes, and they queue kernels, copies and recordings only. Where both want the same resources,
  // first() goes first. What is queued next waits for both.
  void SideBySide(const std::function<void()>& first, const std::function<void()>& second);

  const std::string& name() const;  // "NVIDIA H100 80GB HBM3", or the CPU's model name
  static const char* backend();     // "cpu" or "cuda"
  size_t memory_total() const;      // bytes
  size_t memory_free() const;       // bytes, now

  struct Impl;  // the queue and handles; defined once per backend
  Impl& impl() { return *impl_; }

 private:
  explicit Device(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Work that is queued again and again at the cost of one launch (a CUDA graph). A CPU just does the
// work again.
class Recording {
 public:
  // What `work` queues on `device`: kernels, copies and fills, but nothing that waits, allocates or
  // uploads. It is not run now. Everything it captures and every pointer it uses must live as long
  // as the recording. The same work must have run before, with the same sizes and strides: the
  // first run loads code and chooses algorithms.
  Recording(Device& device, std::function<void()> work);
  ~Recording();
  Recording(Recording&& other) noexcept;
  Recording& operator=(Recording&& other) noexcept;

  void Replay() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A move-only claim on device memory, given back when destroyed.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device& device, size_t bytes)
      : device_(&device), data_(bytes == 0 ? nullptr : device.Allocate(bytes)), bytes_(bytes) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) device_->Free(data_);
  }

  // False when the allocation failed.
  bool ok() const { return bytes_ == 0 || data_ != nullptr; }
  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory into which bytes of the device are copied without waiting for them.
class Readback {
 public:
  Readback(Device& device, size_t capacity);
  ~Readback();  // waits for a copy that is under way
  Readback(const Readback&) = delete;
  Readback& operator=(const Readback&) = delete;

  // False when there was no memory.
  bool ok() const { return data_ != nullptr; }
  // Queues the copy. REQUIRES: bytes <= capacity.
  void Start(const void* device_src, size_t bytes);
  // Waits for the last Start's copy, not for what was queued after it. The bytes stay until the
  // next Start.
  const void* Wait();

 private:
  Device& device_;
  void* data_ = nullptr;
  void* event_ = nullptr;  // the backend's
};

}  // namespace gla
