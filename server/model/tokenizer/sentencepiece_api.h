// The table of functions by which gla-server talks to libgla_sentencepiece.so.
//
// Debian's libsentencepiece carries a protobuf of its own whose symbols are visible and clash with
// the protobuf that gRPC services need: with both in one scope the process dies before main(). So
// the library lives behind a module that is opened with RTLD_DEEPBIND and exchanges plain memory
// only: no object of the C++ library is made on one side and destroyed on the other.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct GlaSentencePieceModel;

struct GlaSentencePieceApi {
  // Null, and the reason by `on_error`, when the library refuses the model.
  GlaSentencePieceModel* (*load)(const char* data, size_t size,
                                 void (*on_error)(void* context, const char* message),
                                 void* context);
  void (*free)(GlaSentencePieceModel*);
  // False, and the reason by `on_error`, when the library cannot encode the text.
  bool (*encode)(const GlaSentencePieceModel*, const char* text, size_t size,
                 void (*on_ids)(void* context, const int32_t* ids, size_t count),
                 void (*on_error)(void* context, const char* message), void* context);
  int32_t (*size)(const GlaSentencePieceModel*);
  int32_t (*bos_id)(const GlaSentencePieceModel*);
  int32_t (*eos_id)(const GlaSentencePieceModel*);
  int32_t (*find)(const GlaSentencePieceModel*, const char* piece, size_t size);
  // Valid as long as the model.
  const char* (*piece)(const GlaSentencePieceModel*, int32_t id, size_t* size);
  const char* (*unknown_text)(const GlaSentencePieceModel*, size_t* size);
  bool (*is_control)(const GlaSentencePieceModel*, int32_t id);
  bool (*is_unknown)(const GlaSentencePieceModel*, int32_t id);
  bool (*is_byte)(const GlaSentencePieceModel*, int32_t id);
};

}  // extern "C"

// The module's one symbol: const GlaSentencePieceApi* gla_sentencepiece_api();
