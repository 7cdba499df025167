// `gla`: talk to a gla-server from a terminal or a script.
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "client/command.h"

namespace {

constexpr char kUsage[] =
    "gla COMMAND [FLAGS]: talk to a gla-server\n"
    "\n"
    "  generate   continue a text or token ids, streamed\n"
    "  chat       turn after turn on one session\n"
    "  score      how likely a file, text or token ids are to the model\n"
    "  tokenize   the tokens of a text, or the text of tokens\n"
    "  sessions   list, create, get, delete\n"
    "  info       what the server serves\n"
    "  health     is it serving?\n"
    "\n"
    "gla COMMAND --help lists its flags. Exit codes: 0 done, 1 the server failed, 2 wrong usage,\n"
    "3 unreachable, 4 the request was refused, 5 try again later, 130 interrupted.\n";

}  // namespace

int main(int argc, char** argv) {
  gla::SetInterruptHandler(
      nullptr);  // before gRPC starts threads, so that all of them inherit its mask
  const std::map<std::string, int (*)(const std::vector<std::string>&)> commands = {
      {"generate", gla::GenerateCommand}, {"chat", gla::ChatCommand},
      {"score", gla::ScoreCommand},       {"tokenize", gla::TokenizeCommand},
      {"sessions", gla::SessionsCommand}, {"info", gla::InfoCommand},
      {"health", gla::HealthCommand}};
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "help") {
    std::cout << kUsage;
    return gla::kExitOk;
  }
  const auto command = commands.find(name);
  if (command == commands.end()) {
    std::cerr << (name.empty() ? "" : "gla: unknown command \"" + name + "\"\n") << kUsage;
    return gla::kExitUsage;
  }
  return command->second(std::vector<std::string>(argv + 2, argv + argc));
}
