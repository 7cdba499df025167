#include "model/tokenizer/sentencepiece_library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <climits>

#include "model/tokenizer/sentencepiece_api.h"

namespace gla {
namespace {

constexpr char kModule[] = "libgla_sentencepiece.so";

// Beside the executable, where the build and the packages put it.
std::string ModulePath() {
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  if (size <= 0) return kModule;
  const std::string executable(path, static_cast<size_t>(size));
  return executable.substr(0, executable.rfind('/') + 1) + kModule;
}

struct Module {
  const GlaSentencePieceApi* api = nullptr;
  std::string error;
};

Module OpenModule() {
  Module module;
  // dlmopen with the base namespace is dlopen, but it is let through by the sanitizers' runtimes,
  // which refuse RTLD_DEEPBIND for the sake of modules that exchange memory; this one does not.
  void* handle = dlmopen(LM_ID_BASE, ModulePath().c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  void* symbol = handle == nullptr ? nullptr : dlsym(handle, "gla_sentencepiece_api");
  if (symbol == nullptr) {
    const char* reason = dlerror();
    module.error = reason == nullptr ? ModulePath() + " cannot be opened" : reason;
    return module;
  }
  module.api = reinterpret_cast<const GlaSentencePieceApi* (*)()>(symbol)();
  return module;
}

// Opened once and for the life of the process.
const Module& TheModule() {
  static const Module module = OpenModule();
  return module;
}

const GlaSentencePieceApi& Api() { return *TheModule().api; }

}  // namespace

std::unique_ptr<SentencePieceLibrary> SentencePieceLibrary::Load(std::string_view model,
                                                                 std::string* error) {
  if (TheModule().api == nullptr) {
    *error = TheModule().error;
    return nullptr;
  }
  GlaSentencePieceModel* loaded = Api().load(
      model.data(), model.size(),
      [](void* context, const char* message) { *static_cast<std::string*>(context) = message; },
      error);
  if (loaded == nullptr) return nullptr;
  return std::unique_ptr<SentencePieceLibrary>(new SentencePieceLibrary(loaded));
}

SentencePieceLibrary::~SentencePieceLibrary() { Api().free(model_); }

bool SentencePieceLibrary::Encode(std::string_view text, std::vector<int32_t>* ids,
                                  std::string* error) const {
  struct Result {
    std::vector<int32_t>* ids;
    std::string* error;
  } result = {ids, error};
  return Api().encode(
      model_, text.data(), text.size(),
      [](void* context, const int32_t* from, size_t count) {
        static_cast<Result*>(context)->ids->assign(from, from + count);
      },
      [](void* context, const char* message) { *static_cast<Result*>(context)->error = message; },
      &result);
}

int32_t SentencePieceLibrary::size() const { return Api().size(model_); }
int32_t SentencePieceLibrary::bos_id() const { return Api().bos_id(model_); }
int32_t SentencePieceLibrary::eos_id() const { return Api().eos_id(model_); }

int32_t SentencePieceLibrary::Find(std::string_view piece) const {
  return Api().find(model_, piece.data(), piece.size());
}

std::string SentencePieceLibrary::unknown_text() const {
  size_t size = 0;
  const char* text = Api().unknown_text(model_, &size);
  return std::string(text, size);
}

std::string SentencePieceLibrary::Piece(int32_t id) const {
  size_t size = 0;
  const char* piece = Api().piece(model_, id, &size);
  return std::string(piece, size);
}

bool SentencePieceLibrary::IsControl(int32_t id) const { return Api().is_control(model_, id); }
bool SentencePieceLibrary::IsUnknown(int32_t id) const { return Api().is_unknown(model_, id); }
bool SentencePieceLibrary::IsByte(int32_t id) const { return Api().is_byte(model_, id); }

}  // namespace gla
