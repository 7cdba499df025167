#include "client/args.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <type_traits>

namespace gla {
namespace {

// False when `text` is no integer, or none of type T.
template <typename T>
bool ParseInteger(const std::string& text, T* value) {
  char* end = nullptr;
  errno = 0;
  if constexpr (std::is_unsigned_v<T>) {
    *value = std::strtoull(text.c_str(), &end, 10);
    if (text.find('-') != std::string::npos) return false;  // strtoull would turn it over
  } else {
    const long long parsed = std::strtoll(text.c_str(), &end, 10);
    *value = static_cast<T>(parsed);
    if (*value != parsed) return false;
  }
  return !text.empty() && *end == '\0' && errno == 0;
}

template <typename T>
std::string Integer() {
  using Limits = std::numeric_limits<T>;
  return "an integer in " + std::to_string(Limits::min()) + " .. " + std::to_string(Limits::max());
}

bool ParseNumber(const std::string& text, double* value) {
  char* end = nullptr;
  *value = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == '\0' && std::isfinite(*value);
}

}  // namespace

void Args::Add(const std::string& name, bool* value, const std::string& help) {
  flags_.push_back({name, "", "", help, [value](const std::string&) { return *value = true; }});
}
void Args::Add(const std::string& name, std::string* value, const std::string& help) {
  flags_.push_back({name, "TEXT", "", help, [value](const std::string& text) {
                      *value = text;
                      return true;
                    }});
}
void Args::Add(const std::string& name, std::optional<std::string>* value,
               const std::string& help) {
  flags_.push_back({name, "TEXT", "", help, [value](const std::string& text) {
                      *value = text;
                      return true;
                    }});
}
void Args::Add(const std::string& name, int64_t* value, const std::string& help) {
  flags_.push_back({name, "INTEGER", Integer<int64_t>(), help,
                    [value](const std::string& text) { return ParseInteger(text, value); }});
}
void Args::Add(const std::string& name, std::optional<int32_t>* value, const std::string& help) {
  AddOptionalInteger(name, value, help);
}
void Args::Add(const std::string& name, std::optional<int64_t>* value, const std::string& help) {
  AddOptionalInteger(name, value, help);
}
void Args::Add(const std::string& name, std::optional<uint64_t>* value, const std::string& help) {
  AddOptionalInteger(name, value, help);
}
template <typename T>
void Args::AddOptionalInteger(const std::string& name, std::optional<T>* value,
                              const std::string& help) {
  flags_.push_back({name, "INTEGER", Integer<T>(), help, [value](const std::string& text) {
                      return ParseInteger(text, &value->emplace());
                    }});
}
void Args::Add(const std::string& name, double* value, const std::string& help) {
  flags_.push_back({name, "NUMBER", "a number", help,
                    [value](const std::string& text) { return ParseNumber(text, value); }});
}
void Args::Add(const std::string& name, std::optional<double>* value, const std::string& help) {
  flags_.push_back({name, "NUMBER", "a number", help, [value](const std::string& text) {
                      return ParseNumber(text, &value->emplace());
                    }});
}
void Args::Add(const std::string& name, std::vector<std::string>* values, const std::string& help) {
  flags_.push_back(
      {name, "TEXT", "", help + " (may be repeated)", [values](const std::string& text) {
         values->push_back(text);
         return true;
       }});
}

std::string Args::Parse(const std::vector<std::string>& arguments,
                        std::vector<std::string>* words) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.rfind("--", 0) != 0 || argument == "--") {
      words->push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    const Flag* flag = nullptr;
    for (const Flag& candidate : flags_) {
      if (candidate.name == name) flag = &candidate;
    }
    if (flag == nullptr) return "unknown flag --" + name;
    std::string value;
    if (flag->kind.empty()) {
      if (equals != std::string::npos) return "--" + name + " takes no value";
    } else if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return "--" + name + ": expected a value";
    }
    if (!flag->set(value)) {
      return "--" + name + ": expected " + flag->expected + ", got \"" + value + "\"";
    }
  }
  return "";
}

std::string Args::Help() const {
  std::string text;
  for (const Flag& flag : flags_) {
    std::string line = "  --" + flag.name + (flag.kind.empty() ? "" : " " + flag.kind);
    line.resize(std::max<size_t>(line.size() + 2, 32), ' ');
    text += line + flag.help + "\n";
  }
  return text;
}

std::optional<std::vector<int32_t>> ParseIds(const std::string& text) {
  std::vector<int32_t> ids;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    int32_t id = 0;
    if (!ParseInteger(text.substr(begin, comma - begin), &id)) return std::nullopt;
    ids.push_back(id);
    begin = comma + 1;
  }
  return ids;
}

}  // namespace gla
