// The SentencePiece library, from a module of its own (sentencepiece_api.h says why).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct GlaSentencePieceModel;

namespace gla {

// A loaded model. Const after Load(); any thread may use it.
class SentencePieceLibrary {
 public:
  // Null, and why in `error`, when the module cannot be opened or the library refuses the model.
  // REQUIRES: CheckSentencePieceModel() found nothing wrong.
  static std::unique_ptr<SentencePieceLibrary> Load(std::string_view model, std::string* error);
  ~SentencePieceLibrary();

  // False, and why in `error`, when the library cannot encode the text.
  bool Encode(std::string_view text, std::vector<int32_t>* ids, std::string* error) const;

  int32_t size() const;
  int32_t bos_id() const;                      // -1: none
  int32_t eos_id() const;                      // -1: none
  int32_t Find(std::string_view piece) const;  // -1: none
  std::string unknown_text() const;            // what the unknown piece is decoded to
  std::string Piece(int32_t id) const;         // REQUIRES, as below: 0 <= id < size()
  bool IsControl(int32_t id) const;
  bool IsUnknown(int32_t id) const;
  bool IsByte(int32_t id) const;

 private:
  explicit SentencePieceLibrary(GlaSentencePieceModel* model) : model_(model) {}
  GlaSentencePieceModel* model_;
};

}  // namespace gla
