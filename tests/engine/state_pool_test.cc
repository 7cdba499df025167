#include "engine/state_pool.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/testing/tiny_model.h"

namespace gla {
namespace {

constexpr int64_t kBytes = 1024;

class StatePoolTest : public ::testing::Test {
 protected:
  const std::unique_ptr<Device> device_ = OpenTestDevice();
  const std::unique_ptr<StatePool> pool_ = ValueOrDie(StatePool::Create(*device_, 4, kBytes, true));
};

TEST_F(StatePoolTest, HandsOutEachSlotOnce) {
  std::set<int32_t> indices;
  std::vector<StatePool::Slot> slots;
  while (pool_->num_free() > 0) {
    slots.push_back(pool_->Acquire());
    indices.insert(slots.back().index());
  }
  EXPECT_EQ(indices, (std::set<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(pool_->num_used(), 4);
  slots.clear();
  EXPECT_EQ(pool_->num_used(), 0);
}

TEST_F(StatePoolTest, ASlotIsGivenBackOnceHoweverItMoves) {
  StatePool::Slot a = pool_->Acquire();
  StatePool::Slot b = std::move(a);
  EXPECT_FALSE(a);
  EXPECT_EQ(a.index(), -1);
  a.Release();
  EXPECT_EQ(pool_->num_used(), 1);
  StatePool::Slot c = pool_->Acquire();
  c = std::move(b);  // gives its own back
  EXPECT_EQ(pool_->num_used(), 1);
  c.Release();
  c.Release();
  EXPECT_EQ(pool_->num_used(), 0);
}

TEST_F(StatePoolTest, FreedMemoryIsNan) {
  StatePool::Slot neighbour = pool_->Acquire();
  StatePool::Slot slot = pool_->Acquire();
  const std::vector<float> ones(kBytes / 4, 1.0f);
  float* memory = pool_->states() + slot.index() * kBytes / 4;
  float* next = pool_->states() + neighbour.index() * kBytes / 4;
  device_->Upload(memory, ones.data(), kBytes);
  device_->Upload(next, ones.data(), kBytes);
  slot.Release();
  std::vector<float> read(kBytes / 4);
  device_->Download(read.data(), memory, kBytes);
  for (const float value : read) ASSERT_TRUE(std::isnan(value));
  device_->Download(read.data(), next, kBytes);
  EXPECT_EQ(read, ones);
}

TEST_F(StatePoolTest, TooManySlotsAreRefused) {
  EXPECT_EQ(StatePool::Create(*device_, 0, kBytes, false).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(StatePool::Create(*device_, int64_t{1} << 40, kBytes, false).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(StatePool::Create(*device_, 1 << 30, int64_t{1} << 40, false).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace gla
