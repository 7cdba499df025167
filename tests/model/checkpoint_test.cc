#include "model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <limits>

#include "absl/strings/str_cat.h"
#include "model/safetensors.h"
#include "tests/fuzz/peak_memory.h"
#include "tests/model/model_folder.h"

namespace gla {
namespace {

using ::gla::testing::LengthPrefix;
using ::gla::testing::ModelFolder;
using ::gla::testing::SafetensorsFile;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// One tensor's entry in a header.
std::string Entry(std::string_view name, std::string_view dtype, std::string_view shape,
                  uint64_t begin, uint64_t end) {
  return absl::StrCat("\"", std::string(name), "\":{\"dtype\":\"", std::string(dtype),
                      "\",\"shape\":", std::string(shape), ",\"data_offsets\":[", begin, ",", end,
                      "]}");
}

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// ---- Files that are no safetensors --------------------------------------------------------------

struct Malformed {
  const char* fact;  // what is wrong, as a test name
  std::string file;
  const char* expected;  // what the message says
};

std::string WithHeader(std::string_view header, size_t data_bytes = 0) {
  return SafetensorsFile(header, std::string(data_bytes, '\0'));
}

std::string Deep(std::string_view open, int times) {
  std::string text = "{\"a\":";
  for (int i = 0; i < times; ++i) text += open;
  return text;
}

std::vector<Malformed> MalformedFiles() {
  const std::string a = Entry("a", "F32", "[2]", 0, 8);
  return {
      {"Empty", "", "truncated: expected at least 8 bytes, found 0"},
      {"ShorterThanTheLength", "1234567", "truncated: expected at least 8 bytes, found 7"},
      {"HeaderLengthZero", LengthPrefix(0), "starts with '{', found \"\""},
      {"HeaderLongerThanFile", LengthPrefix(100) + "{}",
       "truncated in the header: expected at least 108 bytes, found 10"},
      {"HeaderOver100Megabytes", LengthPrefix(100'000'001) + "{}",
       "header length: expected at most 100000000 bytes, found 100000001"},
      {"HeaderLengthTwoToThe63", LengthPrefix(uint64_t{1} << 63) + "{}",
       "expected at most 100000000 bytes, found 9223372036854775808"},
      {"HeaderLengthAllOnes", LengthPrefix(UINT64_MAX) + "{}", "found 18446744073709551615"},
      {"HeaderIsAList", WithHeader("[]"), "starts with '{', found \"[]\""},
      {"HeaderStartsWithASpace", WithHeader(" {}"), "starts with '{'"},
      {"HeaderStartsWithAByteOrderMark", WithHeader("\xEF\xBB\xBF{}"), "starts with '{'"},
      {"HeaderIsCut", WithHeader("{\"a\":{\"dtype\":\"F32\""), "not valid JSON at byte 20"},
      {"HeaderHasTextAfterIt", WithHeader("{}x"), "not valid JSON at byte 3"},
      {"HeaderHasAComment", WithHeader("{/**/}"), "not valid JSON"},
      {"NameIsInvalidUtf8", WithHeader("{\"\xff\":{}}"), "not valid JSON"},
      {"TensorTwice", WithHeader("{" + a + "," + a + "}", 8), "name \"a\" appears twice"},
      {"MetadataTwice", WithHeader("{\"__metadata__\":{},\"__metadata__\":{}}"),
       "\"__metadata__\" appears twice"},
      {"FieldTwice", WithHeader("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F16\"}}"),
       "name \"dtype\" appears twice"},
      {"NestedDeep", WithHeader(Deep("[", 100'000)), "nested deeper than 32"},
      {"ObjectsNestedDeep", WithHeader(Deep("{\"a\":", 100'000)), "nested deeper than 32"},
      {"MetadataIsAList", WithHeader("{\"__metadata__\":[]}"),
       "__metadata__: expected an object of strings, found []"},
      {"MetadataHoldsANumber", WithHeader("{\"__metadata__\":{\"k\":1}}"),
       "__metadata__: expected a string for \"k\", found 1"},
      {"TensorIsNull", WithHeader("{\"a\":null}"),
       "tensor \"a\": expected the fields dtype, shape and data_offsets, found null"},
      {"DTypeMissing", WithHeader("{\"a\":{\"shape\":[],\"data_offsets\":[0,0]}}"),
       "expected the fields dtype, shape and data_offsets"},
      {"FieldUnknown",
       WithHeader("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"x\":1}}"),
       "expected the fields dtype, shape and data_offsets"},
      {"DTypeUnknown", WithHeader("{" + Entry("a", "F31", "[2]", 0, 8) + "}", 8),
       "tensor \"a\": unknown dtype \"F31\""},
      {"DTypeIsANumber", WithHeader("{\"a\":{\"dtype\":4,\"shape\":[],\"data_offsets\":[0,4]}}", 4),
       "tensor \"a\": unknown dtype 4"},
      {"ShapeIsANumber", WithHeader("{" + Entry("a", "F32", "2", 0, 8) + "}", 8),
       "tensor \"a\": shape: expected a list"},
      {"ShapeIsNegative", WithHeader("{" + Entry("a", "F32", "[-2]", 0, 8) + "}", 8),
       "shape: expected sizes of 0 or more, found [-2]"},
      {"ShapeIsFractional", WithHeader("{" + Entry("a", "F32", "[2.0]", 0, 8) + "}", 8),
       "shape: expected sizes of 0 or more, found [2.0]"},
      {"ShapeBeyond63Bits",
       WithHeader("{" + Entry("a", "F32", "[9223372036854775808]", 0, 8) + "}", 8),
       "shape: expected sizes of 0 or more"},
      {"ShapeOfNineDimensions",
       WithHeader("{" + Entry("a", "U8", "[1,1,1,1,1,1,1,1,1]", 0, 1) + "}", 1),
       "shape: expected a list of at most 8 sizes"},
      {"ShapeProductOverflows",
       WithHeader("{" + Entry("a", "F32", "[4194305,4194305,211106198978564]", 0, 4) + "}", 4),
       "the size of shape [4194305, 4194305, 211106198978564] overflows"},
      {"ShapeTimesDTypeOverflows",
       WithHeader("{" + Entry("a", "F64", "[2305843009213693953]", 0, 8) + "}", 8), "overflows"},
      {"OffsetsMissingOne",
       WithHeader("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1),
       "data_offsets: expected [begin, end], found [0]"},
      {"OffsetsAreText",
       WithHeader("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[\"0\",1]}}", 1),
       "data_offsets: expected [begin, end]"},
      {"OffsetIsNegative",
       WithHeader("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[-1,0]}}", 1),
       "data_offsets: expected [begin, end], found [-1,0]"},
      {"BeginAfterEnd", WithHeader("{" + Entry("a", "F32", "[2]", 8, 0) + "}", 8),
       "tensor \"a\": data_offsets: expected begin <= end, found [8,0]"},
      {"LengthUnlikeShape", WithHeader("{" + Entry("a", "F32", "[3]", 0, 8) + "}", 8),
       "tensor \"a\": expected 12 bytes for F32 [3], found 8 in data_offsets"},
      {"LengthUnlikeDType", WithHeader("{" + Entry("a", "BF16", "[2]", 0, 8) + "}", 8),
       "tensor \"a\": expected 4 bytes for BF16 [2], found 8"},
      {"Overlap", WithHeader("{" + a + "," + Entry("b", "F32", "[2]", 4, 12) + "}", 12),
       "tensor \"b\": expected its data to begin at 8, found 4 (overlaps"},
      {"SameData", WithHeader("{" + a + "," + Entry("b", "F32", "[2]", 0, 8) + "}", 8),
       "tensor \"b\": expected its data to begin at 8, found 0 (overlaps"},
      {"Hole", WithHeader("{" + a + "," + Entry("b", "F32", "[1]", 12, 16) + "}", 16),
       "tensor \"b\": expected its data to begin at 8, found 12 (leaves a hole)"},
      {"HoleAtTheStart", WithHeader("{" + Entry("a", "F32", "[1]", 4, 8) + "}", 8),
       "expected its data to begin at 0, found 4"},
      {"EmptyTensorInsideAnother",
       WithHeader("{" + a + "," + Entry("e", "F32", "[0]", 4, 4) + "}", 8),
       "tensor \"e\": expected its data to begin at 8, found 4"},
      {"DataIsCut", WithHeader("{" + a + "}", 7), "truncated: expected 70 bytes, found 69"},
      {"OffsetsBeyondFile", WithHeader("{" + Entry("a", "U8", "[4294967296]", 0, 4294967296) + "}"),
       "truncated: expected 4294967375 bytes, found 79"},
      {"OffsetsNearTwoToThe64",
       WithHeader(
           "{" + Entry("a", "U8", "[9223372036854775807]", 0, 9223372036854775807u) + "," +
           Entry("b", "U8", "[9223372036854775807]", 9223372036854775807u, 18446744073709551614u) +
           "}"),
       "tensor \"b\": data_offsets lie beyond any file"},
      {"BytesAfterTheLastTensor", WithHeader("{" + a + "}", 9),
       "bytes after the last tensor: expected 70 bytes, found 71"},
  };
}

class MalformedFileTest : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedFileTest, IsRefusedNamingFileAndRule) {
  const ModelFolder folder;
  folder.Write("model.safetensors", GetParam().file);
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(folder.path());
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(checkpoint.status()),
              AllOf(HasSubstr("model.safetensors: "), HasSubstr(GetParam().expected)));
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, MalformedFileTest, ::testing::ValuesIn(MalformedFiles()),
                         [](const auto& info) { return std::string(info.param.fact); });

TEST(Checkpoint, HundredThousandEntriesCostUnderASecondAndManyMoreAreRefused) {
  std::string header = "{";
  for (int i = 0; i < 100'000; ++i) {
    absl::StrAppend(&header, Entry(absl::StrCat("t", i), "U8", "[1]", i, i + 1), ",");
  }
  std::string too_many = header + Entry("x", "U8", "[1]", 100'000, 100'001) + ",";
  header.back() = '}';
  absl::StrAppend(&too_many, Entry("y", "U8", "[1]", 100'001, 100'002), "}");
  const std::string file = SafetensorsFile(header, std::string(100'000, '\0'));

  gla::testing::ResetPeakMemory();
  const clock_t start = clock();
  const absl::StatusOr<Safetensors> parsed = ParseSafetensors(file);
  const double seconds = static_cast<double>(clock() - start) / CLOCKS_PER_SEC;
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->tensors.size(), 100'000u);
  EXPECT_LT(gla::testing::PeakMemory(), 200u << 20);
  EXPECT_LT(seconds, GLA_SECONDS_LIMIT);  // 1, more under a sanitizer

  const auto refused = ParseSafetensors(SafetensorsFile(too_many, std::string(100'002, '\0')));
  EXPECT_THAT(Message(refused.status()),
              HasSubstr("expected at most 100000 tensors, found 100002"));
}

TEST(Checkpoint, MessagesQuoteHostileNamesEscapedAndShort) {
  const std::string name = "x\\n\\u0000" + std::string(100'000, 'y');
  const auto parsed = ParseSafetensors(WithHeader("{\"" + name + "\":1}"));
  EXPECT_THAT(Message(parsed.status()), HasSubstr("tensor \"x\\n\\x00yyy"));
  EXPECT_LT(Message(parsed.status()).size(), 400u);
}

// ---- Files that are -----------------------------------------------------------------------------

TEST(Checkpoint, FindsTensorsAndMetadata) {
  const ModelFolder folder;
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  folder.Write("model.safetensors", SafetensorsFile("{\"__metadata__\":{\"format\":\"pt\"}," +
                                                        Entry("b", "F32", "[2,3]", 0, 24) + "," +
                                                        Entry("a", "I64", "[]", 24, 32) + "}   ",
                                                    Bytes(values) + std::string(8, '\1')));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT(checkpoint->names(), ElementsAre("a", "b"));
  EXPECT_EQ(checkpoint->metadata().at("format"), "pt");
  const TensorView* b = checkpoint->Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_THAT(b->shape, ElementsAre(2, 3));
  EXPECT_EQ(b->dtype_name, "F32");
  ASSERT_EQ(b->bytes, 24u);
  EXPECT_EQ(std::memcmp(b->data, values.data(), 24), 0);
  EXPECT_EQ(checkpoint->Find("c"), nullptr);
}

TEST(Checkpoint, EmptyTensorsAndNoTensorsAreAllowed) {
  const auto empty = ParseSafetensors(WithHeader(
      "{" + Entry("e", "F32", "[0,5]", 0, 0) + "," + Entry("a", "U8", "[2]", 0, 2) + "}", 2));
  ASSERT_TRUE(empty.ok()) << empty.status();
  EXPECT_EQ(empty->tensors.size(), 2u);
  EXPECT_TRUE(ParseSafetensors(WithHeader("{}")).ok());
}

TEST(Checkpoint, AnEmptyFolderIsNotFound) {
  const ModelFolder folder;
  const auto checkpoint = Checkpoint::Open(folder.path());
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(checkpoint.status()), HasSubstr("expected model.safetensors or"));
  EXPECT_EQ(Checkpoint::Open(folder.File("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Checkpoint::OpenFile(folder.File("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST(Checkpoint, FoldersAndPipesAreNoFiles) {
  const ModelFolder folder;
  std::filesystem::create_directory(folder.File("model.safetensors"));
  EXPECT_THAT(Message(Checkpoint::Open(folder.path()).status()),
              HasSubstr("expected a regular file"));
  ASSERT_EQ(mkfifo(folder.File("pipe").c_str(), 0600), 0);
  EXPECT_THAT(Message(Checkpoint::OpenFile(folder.File("pipe")).status()),
              HasSubstr("expected a regular file"));
}

// ---- Weights ------------------------------------------------------------------------------------

// A checkpoint of one tensor "w".
absl::StatusOr<Checkpoint> OneTensor(const ModelFolder& folder, std::string_view dtype,
                                     std::string_view shape, std::string_view data) {
  folder.Write("model.safetensors",
               SafetensorsFile("{" + Entry("w", dtype, shape, 0, data.size()) + "}", data));
  return Checkpoint::Open(folder.path());
}

TEST(CheckpointWeight, IsReturnedWhenDTypeAndShapeFit) {
  const ModelFolder folder;
  for (const auto& [dtype, expected] :
       {std::pair{"F32", DType::kFloat32}, {"F16", DType::kFloat16}, {"BF16", DType::kBFloat16}}) {
    auto checkpoint = OneTensor(folder, dtype, "[2,3]", std::string(6 * SizeOf(expected), '\0'));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto weight = checkpoint->Weight("w", {2, 3});
    ASSERT_TRUE(weight.ok()) << weight.status();
    EXPECT_EQ(WeightDType(**weight), expected);
    EXPECT_TRUE(checkpoint->CheckAllUsed().ok());
  }
}

TEST(CheckpointWeight, SaysWhichTensorWhatWasExpectedAndFound) {
  const ModelFolder folder;
  auto checkpoint = OneTensor(folder, "F32", "[2,3]", std::string(24, '\0'));
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(Message(checkpoint->Weight("w", {3, 2}).status()),
            "tensor w: expected shape [3, 2], found [2, 3]");
  EXPECT_EQ(Message(checkpoint->Weight("w", {6}).status()),
            "tensor w: expected shape [6], found [2, 3]");
  EXPECT_EQ(Message(checkpoint->Weight("v", {6}).status()),
            "tensor v: expected shape [6], found no such tensor");
  auto integers = OneTensor(folder, "I32", "[6]", std::string(24, '\0'));
  ASSERT_TRUE(integers.ok());
  EXPECT_EQ(Message(integers->Weight("w", {6}).status()),
            "tensor w: expected dtype F32, F16 or BF16, found I32");
  EXPECT_FALSE(integers->CheckAllUsed().ok());
}

TEST(CheckpointWeight, NanAndInfinityAreFoundInEveryDTypeAtEveryPlace) {
  const ModelFolder folder;
  constexpr int kCount = 10'000;  // some blocks of the scan and a rest
  const float inf = std::numeric_limits<float>::infinity();
  for (const int at : {0, 1, 4095, 4096, 8191, 8192, 9999}) {
    for (const float bad : {std::nanf(""), inf, -inf}) {
      std::vector<float> values(kCount, std::numeric_limits<float>::max());
      values[at] = bad;
      auto checkpoint = OneTensor(folder, "F32", "[10000]", Bytes(values));
      ASSERT_TRUE(checkpoint.ok());
      EXPECT_EQ(Message(checkpoint->Weight("w", {kCount}).status()),
                absl::StrCat("tensor w: expected finite values, found NaN or infinity at index ",
                             at, " of 10000"));
    }
    const auto expect_bad = [&](std::string_view dtype, uint16_t largest, uint16_t bad) {
      std::vector<uint16_t> values(kCount, largest);
      values[at] = bad;
      auto checkpoint = OneTensor(folder, dtype, "[10000]", Bytes(values));
      ASSERT_TRUE(checkpoint.ok());
      EXPECT_THAT(Message(checkpoint->Weight("w", {kCount}).status()),
                  HasSubstr(absl::StrCat("at index ", at, " of")));
    };
    for (const int sign : {0, 0x8000}) {
      expect_bad("BF16", 0x7f7f, 0x7f80 | sign);  // infinity
      expect_bad("BF16", 0xff7f, 0x7f81 | sign);  // NaN
      expect_bad("F16", 0x7bff, 0x7c00 | sign);
      expect_bad("F16", 0xfbff, 0x7c01 | sign);
    }
  }
}

TEST(CheckpointWeight, DataThatTheFileDoesNotAlignIsReadAligned) {
  const ModelFolder folder;
  const std::vector<float> values = {1.5f, -2.5f};
  folder.Write("model.safetensors", SafetensorsFile("{" + Entry("odd", "U8", "[1]", 0, 1) + "," +
                                                        Entry("w", "F32", "[2]", 1, 9) + "}",
                                                    std::string(1, '\0') + Bytes(values)));
  auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto weight = checkpoint->Weight("w", {2});
  ASSERT_TRUE(weight.ok()) << weight.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>((*weight)->data) % 4, 0u);
  EXPECT_EQ(std::memcmp((*weight)->data, values.data(), 8), 0);
}

TEST(CheckpointWeight, AnEmptyTensorIsNoReasonToCopy) {
  const ModelFolder folder;
  folder.Write("model.safetensors", WithHeader("{" + Entry("odd", "U8", "[1]", 0, 1) + "," +
                                                   Entry("w", "F32", "[0]", 1, 1) + "}",
                                               1));
  auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(checkpoint->Weight("w", {0}).ok());
}

TEST(CheckpointWeight, UnusedTensorsAreListedUpToFive) {
  const ModelFolder folder;
  std::string header = "{" + Entry("used", "F32", "[1]", 0, 4);
  for (int i = 0; i < 7; ++i) {
    absl::StrAppend(&header, ",", Entry(absl::StrCat("extra", i), "U8", "[0]", 4, 4));
  }
  folder.Write("model.safetensors", SafetensorsFile(header + "}", std::string(4, '\0')));
  auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE(checkpoint->Weight("used", {1}).ok());
  EXPECT_THAT(
      Message(checkpoint->CheckAllUsed()),
      AllOf(HasSubstr("7 tensors"),
            HasSubstr("\"extra0\", \"extra1\", \"extra2\", \"extra3\", \"extra4\", 2 more")));
}

TEST(CheckpointWeight, AFileCutOrWrittenDuringTheLoadIsNoticed) {
  const ModelFolder folder;
  const std::string data(64 << 10, '\0');
  auto cut = OneTensor(folder, "F32", "[16384]", data);
  ASSERT_TRUE(cut.ok());
  const auto size = std::filesystem::file_size(folder.File("model.safetensors"));
  std::filesystem::resize_file(folder.File("model.safetensors"), 100);
  EXPECT_THAT(
      Message(cut->Weight("w", {16384}).status()),
      HasSubstr(absl::StrCat("changed while it was loaded: expected ", size, " bytes, found 100")));
  EXPECT_FALSE(cut->CheckAllUsed().ok());

  auto written = OneTensor(folder, "F32", "[16384]", data);
  ASSERT_TRUE(written.ok());
  ASSERT_TRUE(written->Weight("w", {16384}).ok());
  std::filesystem::last_write_time(
      folder.File("model.safetensors"),
      std::filesystem::file_time_type::clock::now() + std::chrono::seconds(2));
  EXPECT_THAT(Message(written->CheckAllUsed()), HasSubstr("was written to while it was loaded"));
}

// ---- Shards -------------------------------------------------------------------------------------

constexpr char kIndex[] = "model.safetensors.index.json";

// Shard one holds "a", shard two "b" and "c".
void WriteShards(const ModelFolder& folder) {
  folder.Write("one.safetensors", WithHeader("{" + Entry("a", "F32", "[1]", 0, 4) + "}", 4));
  folder.Write("two.safetensors", WithHeader("{" + Entry("b", "F32", "[1]", 0, 4) + "," +
                                                 Entry("c", "F32", "[1]", 4, 8) + "}",
                                             8));
  folder.Write(kIndex, R"({"metadata":{"total_size":12},"weight_map":{"a":"one.safetensors",)"
                       R"("b":"two.safetensors","c":"two.safetensors"}})");
}

std::string OpenError(const ModelFolder& folder) {
  const auto checkpoint = Checkpoint::Open(folder.path());
  return checkpoint.ok() ? "opened" : Message(checkpoint.status());
}

TEST(CheckpointShards, AreOneCheckpoint) {
  const ModelFolder folder;
  WriteShards(folder);
  auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT(checkpoint->names(), ElementsAre("a", "b", "c"));
  for (const char* name : {"a", "b", "c"}) EXPECT_TRUE(checkpoint->Weight(name, {1}).ok());
  EXPECT_TRUE(checkpoint->CheckAllUsed().ok());
}

TEST(CheckpointShards, MissingShardIsNamed) {
  const ModelFolder folder;
  WriteShards(folder);
  std::filesystem::remove(folder.File("two.safetensors"));
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(OpenError(folder), HasSubstr("two.safetensors: cannot open: No such file"));
}

TEST(CheckpointShards, CutShardSaysExpectedAndFound) {
  const ModelFolder folder;
  WriteShards(folder);
  const auto size = std::filesystem::file_size(folder.File("two.safetensors"));
  std::filesystem::resize_file(folder.File("two.safetensors"), size - 3);
  EXPECT_THAT(OpenError(folder),
              AllOf(HasSubstr("two.safetensors: truncated"),
                    HasSubstr(absl::StrCat("expected ", size, " bytes, found ", size - 3))));
}

TEST(CheckpointShards, ShardsAndIndexMustAgree) {
  const ModelFolder folder;
  WriteShards(folder);
  folder.Write(kIndex, R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  EXPECT_THAT(OpenError(folder), HasSubstr("holds tensors the index does not place here: \"c\""));
  folder.Write(kIndex, R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors"}})");
  EXPECT_THAT(
      OpenError(folder),
      HasSubstr("one.safetensors: expected the tensors the index places here, found none of "
                "\"b\""));
}

TEST(CheckpointShards, ATensorInTwoShardsIsRefused) {
  const ModelFolder folder;
  WriteShards(folder);
  folder.Write("two.safetensors", WithHeader("{" + Entry("a", "F32", "[1]", 0, 4) + "}", 4));
  folder.Write(kIndex, R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})");
  EXPECT_THAT(OpenError(folder), HasSubstr("name \"a\" appears twice"));
}

TEST(CheckpointShards, NamesLeadNowhereElse) {
  const ModelFolder folder;
  WriteShards(folder);
  for (const char* name : {"../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".",
                           "", "one.safetensors\\u0000x"}) {
    folder.Write(kIndex, absl::StrCat(R"({"weight_map":{"a":")", name, "\"}}"));
    EXPECT_THAT(OpenError(folder), HasSubstr("expected a plain file name")) << name;
  }
}

TEST(CheckpointShards, SymbolicLinksMayNotLeaveTheFolder) {
  const ModelFolder folder, elsewhere;
  WriteShards(folder);
  std::filesystem::rename(folder.File("one.safetensors"), elsewhere.File("one.safetensors"));
  std::filesystem::create_symlink(elsewhere.File("one.safetensors"),
                                  folder.File("one.safetensors"));
  EXPECT_THAT(OpenError(folder), HasSubstr("a symbolic link out of the model folder"));

  // Within the folder they may lead anywhere, as volumes of Kubernetes do.
  std::filesystem::create_directory(folder.File("..data"));
  std::filesystem::rename(elsewhere.File("one.safetensors"), folder.File("..data/one.safetensors"));
  std::filesystem::remove(folder.File("one.safetensors"));
  std::filesystem::create_symlink("..data/one.safetensors", folder.File("one.safetensors"));
  EXPECT_EQ(OpenError(folder), "opened");

  // A dangling link is no reason to look for another file.
  std::filesystem::create_symlink("nowhere", folder.File("model.safetensors"));
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
}

TEST(CheckpointShards, MalformedIndexesAreRefused) {
  const ModelFolder folder;
  const std::pair<std::string, const char*> cases[] = {
      {"", "index.json: not valid JSON"},
      {"[]", "expected an object with weight_map"},
      {"{}", "expected an object with weight_map"},
      {R"({"weight_map":[]})", "expected an object with weight_map"},
      {R"({"weight_map":{}})", "weight_map is empty"},
      {R"({"weight_map":{"a":1}})", "weight_map of \"a\": expected a file name, found 1"},
      {Deep("{\"a\":", 1000), "nested deeper than 32"},
  };
  for (const auto& [index, expected] : cases) {
    folder.Write(kIndex, index);
    EXPECT_THAT(OpenError(folder), HasSubstr(expected));
  }
}

// ---- Real ones ----------------------------------------------------------------------------------

TEST(Checkpoint, EveryGoldenFileOpensAndIsFinite) {
  int num_files = 0;
  for (const char* below : {"/tests/golden", "/deploy/models"}) {
    for (const auto& entry :
         std::filesystem::recursive_directory_iterator(std::string(GLA_SOURCE_DIR) + below)) {
      if (entry.path().extension() != ".safetensors") continue;
      auto checkpoint = Checkpoint::OpenFile(entry.path());
      ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
      ++num_files;
      if (entry.path().filename() != "model.safetensors") continue;
      for (const std::string& name : checkpoint->names()) {
        const auto weight = checkpoint->Weight(name, checkpoint->Find(name)->shape);
        EXPECT_TRUE(weight.ok()) << weight.status();
      }
      EXPECT_TRUE(checkpoint->CheckAllUsed().ok());
    }
  }
  EXPECT_GE(num_files, 11);
}

}  // namespace
}  // namespace gla
