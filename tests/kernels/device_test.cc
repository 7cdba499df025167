#include "kernels/device.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/harness.h"
#include "tests/testing/near.h"

namespace gla {
namespace {

TEST(Device, SaysWhatItIs) {
  Device& device = TestDevice();
  EXPECT_FALSE(device.name().empty());
  EXPECT_GT(device.memory_total(), size_t{1} << 28);
  EXPECT_LE(device.memory_free(), device.memory_total());
  EXPECT_GT(device.memory_free(), 0u);
}

TEST(Device, AnUnknownOrdinalIsAnErrorAndNotADevice) {
  std::string error;
  EXPECT_EQ(Device::Open({.ordinal = 99}, &error), nullptr);
  EXPECT_NE(error.find("99"), std::string::npos) << error;
}

TEST(Device, MemoryIsAlignedAndPoisoned) {
  for (size_t n : {1, 7, 64, 1000}) {
    DeviceBuffer buffer = Poisoned(n, DType::kFloat32);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 256, 0u);
    EXPECT_TRUE(AllNaN(Download<float>(buffer, n)));
  }
}

TEST(Device, MoreMemoryThanThereIsGivesNull) {
  Device& device = TestDevice();
  EXPECT_EQ(device.Allocate(device.memory_total() + (size_t{1} << 30)), nullptr);
  EXPECT_EQ(device.Allocate(std::numeric_limits<size_t>::max() - 4096), nullptr);
  DeviceBuffer small(device, 64);
  EXPECT_TRUE(small.ok());
  DeviceBuffer huge(device, device.memory_total() * 4);
  EXPECT_FALSE(huge.ok());
}

TEST(Device, BytesGoUpAcrossAndDown) {
  const std::vector<float> values = Normal(1000, 1, 1);
  DeviceBuffer a = Upload(values), b = Poisoned(1000, DType::kFloat32);
  TestDevice().Copy(b.data(), a.data(), a.bytes());
  EXPECT_TRUE(IsSameBits(Download<float>(b, 1000), values));
  TestDevice().Fill(b.data(), 0, 500 * sizeof(float));
  TestDevice().Synchronize();
  const std::vector<float> half = Download<float>(b, 1000);
  EXPECT_EQ(half[499], 0.0f);
  EXPECT_EQ(half[500], values[500]);
}

TEST(Device, AnUploadsSourceIsFreeOnReturn) {
  std::vector<int32_t> values(4096, 7);
  DeviceBuffer buffer(TestDevice(), values.size() * sizeof(int32_t));
  TestDevice().Upload(buffer.data(), values.data(), buffer.bytes());
  std::fill(values.begin(), values.end(), 8);
  EXPECT_EQ(Download<int32_t>(buffer, 4096), std::vector<int32_t>(4096, 7));
}

TEST(Readback, GivesTheBytesOfItsPlaceInTheQueue) {
  const std::vector<float> first = Normal(1000, 1, 3), second = Normal(1000, 1, 4);
  DeviceBuffer buffer = Upload(first);
  Readback early(TestDevice(), buffer.bytes()), late(TestDevice(), buffer.bytes());
  ASSERT_TRUE(early.ok());
  const auto floats = [](Readback& readback, size_t count) {
    const auto* begin = static_cast<const float*>(readback.Wait());
    return std::vector<float>(begin, begin + count);
  };
  early.Start(buffer.data(), buffer.bytes());
  TestDevice().Upload(buffer.data(), second.data(), buffer.bytes());
  late.Start(buffer.data(), 500 * sizeof(float));
  TestDevice().Fill(buffer.data(), 0, buffer.bytes());
  EXPECT_TRUE(IsSameBits(floats(early, 1000), first));
  EXPECT_TRUE(IsSameBits(floats(late, 500), {second.begin(), second.begin() + 500}));
  EXPECT_TRUE(IsSameBits(floats(early, 1000), first));  // again
  early.Start(buffer.data(), sizeof(float));
  EXPECT_EQ(floats(early, 1)[0], 0.0f);
  late.Start(nullptr, 0);
  late.Wait();
}

TEST(Readback, MayEndWithACopyUnderWay) {
  DeviceBuffer buffer = Poisoned(1 << 20, DType::kFloat32);
  Readback readback(TestDevice(), buffer.bytes());
  readback.Wait();
  readback.Start(buffer.data(), buffer.bytes());
}

TEST(DeviceBuffer, MovesItsClaim) {
  DeviceBuffer a(TestDevice(), 64);
  void* memory = a.data();
  DeviceBuffer b(std::move(a));
  EXPECT_EQ(b.data(), memory);
  DeviceBuffer empty;
  EXPECT_TRUE(empty.ok());
  EXPECT_EQ(empty.data(), nullptr);
}

TEST(Device, ManySmallCallsAfterPausesAllFinish) {
  // On the CPU the pool's threads have gone to sleep in between; no wake-up may be lost.
  const int rows = 64, dim = 512;
  const std::vector<float> values = Normal(rows * dim, 1, 2);
  DeviceBuffer x = Upload(values), y = Poisoned(values.size(), DType::kFloat32);
  const RmsNormArgs args = {.x = x.data(),
                            .y = y.data(),
                            .rows = rows,
                            .groups = 1,
                            .dim = dim,
                            .x_stride = dim,
                            .y_stride = dim,
                            .eps = 1e-6f,
                            .x_dtype = DType::kFloat32,
                            .y_dtype = DType::kFloat32};
  RmsNorm(TestDevice(), args);
  const std::vector<float> first = Download<float>(y, values.size());
  for (int i = 0; i < 300; ++i) {
    if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100 * (i % 7)));
    TestDevice().Fill(y.data(), 0xFF, y.bytes());
    RmsNorm(TestDevice(), args);
    ASSERT_TRUE(IsSameBits(Download<float>(y, values.size()), first));
  }
}

TEST(Recording, DoesItsWorkAtEachReplayOnWhatIsThereThen) {
  DeviceBuffer x = Upload(std::vector<float>(64, 1.0f)), y = Poisoned(64, DType::kFloat32);
  Device& device = TestDevice();
  const auto work = [&] { device.Copy(y.data(), x.data(), x.bytes()); };
  Recording recording(device, work);
  EXPECT_TRUE(std::isnan(Download<float>(y, 64)[0]));  // recorded, not done
  recording.Replay();
  EXPECT_EQ(Download<float>(y, 64), std::vector<float>(64, 1.0f));
  const std::vector<float> two(64, 2.0f);
  device.Upload(x.data(), two.data(), x.bytes());
  Recording moved = std::move(recording);
  moved.Replay();
  EXPECT_EQ(Download<float>(y, 64), two);
}

// Both come after what was queued before and before what is queued next, recorded or not.
TEST(SideBySide, RunsBothBetweenWhatIsAroundThem) {
  Device& device = TestDevice();
  const size_t n = 1 << 22;
  DeviceBuffer x = Poisoned(n, DType::kFloat32), y = Poisoned(n, DType::kFloat32);
  DeviceBuffer z = Poisoned(2 * n, DType::kFloat32);
  const auto both = [&](int byte) {
    device.Fill(x.data(), byte, x.bytes());
    device.SideBySide([&] { device.Copy(z.data(), x.data(), x.bytes()); },
                      [&] {
                        for (int i = 0; i < 5; ++i) device.Copy(y.data(), x.data(), x.bytes());
                      });
    device.Copy(z.as<float>() + n, y.data(), y.bytes());
    device.Fill(x.data(), 0, x.bytes());
  };
  const auto all = [&](int byte) {
    std::vector<uint8_t> got(z.bytes());
    device.Download(got.data(), z.data(), z.bytes());
    return std::all_of(got.begin(), got.end(), [byte](uint8_t b) { return b == byte; });
  };
  for (int byte = 1; byte < 20; ++byte) {
    both(byte);
    ASSERT_TRUE(all(byte));
  }
  const Recording recording(device, [&] { both(77); });
  recording.Replay();
  EXPECT_TRUE(all(77));
}

}  // namespace
}  // namespace gla
