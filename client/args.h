// Command line flags of the client programs: a table of (name, value, help), parsed in one place.
//
// --name VALUE and --name=VALUE; a bool flag takes no value. An unknown flag, a missing value or a
// value of the wrong form is an error that says which flag, what was expected and what was found.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace gla {

class Args {
 public:
  void Add(const std::string& name, bool* value, const std::string& help);
  void Add(const std::string& name, std::string* value, const std::string& help);
  void Add(const std::string& name, std::optional<std::string>* value, const std::string& help);
  void Add(const std::string& name, int64_t* value, const std::string& help);
  void Add(const std::string& name, std::optional<int32_t>* value, const std::string& help);
  void Add(const std::string& name, std::optional<int64_t>* value, const std::string& help);
  void Add(const std::string& name, std::optional<uint64_t>* value, const std::string& help);
  void Add(const std::string& name, double* value, const std::string& help);
  void Add(const std::string& name, std::optional<double>* value, const std::string& help);
  void Add(const std::string& name, std::vector<std::string>* values, const std::string& help);

  // Positional words go to `words`. Returns the error, or an empty string.
  std::string Parse(const std::vector<std::string>& arguments, std::vector<std::string>* words);
  // One line per flag.
  std::string Help() const;

 private:
  template <typename T>
  void AddOptionalInteger(const std::string& name, std::optional<T>* value,
                          const std::string& help);

  struct Flag {
    std::string name;
    std::string kind;      // "", "TEXT", "INTEGER", "NUMBER"
    std::string expected;  // in words, where a value may be wrong
    std::string help;
    std::function<bool(const std::string&)> set;
  };
  std::vector<Flag> flags_;
};

// "1,2,3" to numbers; nothing on a bad form or a number outside int32.
std::optional<std::vector<int32_t>> ParseIds(const std::string& text);

}  // namespace gla
