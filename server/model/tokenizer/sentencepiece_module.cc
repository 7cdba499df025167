// libgla_sentencepiece.so: the SentencePiece library behind plain functions. See
// sentencepiece_api.h.
#include <sentencepiece_processor.h>

#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer/sentencepiece_api.h"

struct GlaSentencePieceModel {
  sentencepiece::SentencePieceProcessor processor;
  std::string unknown_text;
};

namespace {

using Model = GlaSentencePieceModel;
using OnError = void (*)(void* context, const char* message);

// Calls the library, whose errors are of two kinds.
template <typename Call>
bool Try(Call call, OnError on_error, void* context) {
  try {
    const sentencepiece::util::Status status = call();
    if (!status.ok()) on_error(context, status.ToString().c_str());
    return status.ok();
  } catch (const std::exception& exception) {
    on_error(context, exception.what());
    return false;
  }
}

Model* Load(const char* data, size_t size, OnError on_error, void* context) {
  auto* model = new Model;
  const bool ok = Try(
      [&] {
        const auto status = model->processor.LoadFromSerializedProto(std::string_view(data, size));
        if (!status.ok()) return status;
        return model->processor.Decode(std::vector<int>{model->processor.unk_id()},
                                       &model->unknown_text);
      },
      on_error, context);
  if (ok) return model;
  delete model;
  return nullptr;
}

void Free(Model* model) { delete model; }

bool Encode(const Model* model, const char* text, size_t size,
            void (*on_ids)(void* context, const int32_t* ids, size_t count), OnError on_error,
            void* context) {
  std::vector<int> ids;
  if (!Try([&] { return model->processor.Encode(std::string_view(text, size), &ids); }, on_error,
           context)) {
    return false;
  }
  on_ids(context, ids.data(), ids.size());
  return true;
}

int32_t Size(const Model* model) { return model->processor.GetPieceSize(); }
int32_t BosId(const Model* model) { return model->processor.bos_id(); }
int32_t EosId(const Model* model) { return model->processor.eos_id(); }

int32_t Find(const Model* model, const char* piece, size_t size) {
  // The library answers with the unknown piece where there is none.
  const std::string_view wanted(piece, size);
  const int32_t id = model->processor.PieceToId(wanted);
  return id >= 0 && id < Size(model) && model->processor.IdToPiece(id) == wanted ? id : -1;
}

const char* Piece(const Model* model, int32_t id, size_t* size) {
  const std::string& piece = model->processor.IdToPiece(id);
  *size = piece.size();
  return piece.data();
}

const char* UnknownText(const Model* model, size_t* size) {
  *size = model->unknown_text.size();
  return model->unknown_text.data();
}

bool IsControl(const Model* model, int32_t id) { return model->processor.IsControl(id); }
bool IsUnknown(const Model* model, int32_t id) { return model->processor.IsUnknown(id); }
bool IsByte(const Model* model, int32_t id) { return model->processor.IsByte(id); }

constexpr GlaSentencePieceApi kApi = {Load, Free,  Encode,      Size,      BosId,     EosId,
                                      Find, Piece, UnknownText, IsControl, IsUnknown, IsByte};

}  // namespace

extern "C" __attribute__((visibility("default"))) const GlaSentencePieceApi*
gla_sentencepiece_api() {
  return &kApi;
}
