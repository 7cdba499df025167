// `gla sessions`, `gla info` and `gla health`.
#include <cstdio>
#include <iostream>

#include "client/command.h"
#include "client/terminal.h"

namespace gla {
namespace {

nlohmann::json ToJson(const v1::Session& session) {
  return {{"session_id", session.session_id()},
          {"position", session.position()},
          {"state_bytes", session.state_bytes()},
          {"busy", session.busy()},
          {"idle_seconds", session.idle_seconds()},
          {"age_seconds", session.age_seconds()},
          {"idle_ttl_seconds", session.idle_ttl_seconds()}};
}

void Print(const v1::Session& session) {
  std::printf("%-32s  position %-8lld  state %lld B  idle %.0f s of %s%s\n",
              session.session_id().c_str(), static_cast<long long>(session.position()),
              static_cast<long long>(session.state_bytes()), session.idle_seconds(),
              session.idle_ttl_seconds() == 0
                  ? "no limit"
                  : (std::to_string(session.idle_ttl_seconds()) + " s").c_str(),
              session.busy() ? "  busy" : "");
}

int ListSessions(Client& client, const Common& common, const CallOptions& options) {
  nlohmann::json all = nlohmann::json::array();
  v1::ListSessionsRequest request;
  request.set_page_size(1000);
  v1::ListSessionsResponse response;
  do {
    const grpc::Status status = client.ListSessions(request, &response, options);
    if (!status.ok()) return Report(status, common);
    for (const v1::Session& session : response.sessions()) {
      if (common.json) {
        all.push_back(ToJson(session));
      } else {
        Print(session);
      }
    }
    request.set_page_token(response.next_page_token());
  } while (!response.next_page_token().empty());
  if (common.json) {
    std::cout << Dump({{"sessions", all}, {"total", response.total()}}) << std::endl;
  } else if (response.total() == 0) {
    std::cout << "no sessions" << std::endl;
  }
  return kExitOk;
}

}  // namespace

int SessionsCommand(const std::vector<std::string>& arguments) {
  Common common;
  std::optional<int64_t> ttl;
  Args args;
  args.Add("ttl", &ttl, "create: seconds of idleness after which it ends; 0: never");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla sessions list | create [ID] | get ID | delete ID\n" << args.Help();
    return kExitOk;
  }
  const std::string verb = words.empty() ? "list" : words[0];
  const std::string id = words.size() > 1 ? words[1] : "";
  if (words.size() > 2) return UsageError("sessions: unexpected \"" + words[2] + "\"");
  Client client(common.target);
  const CallOptions options{common.timeout, InterruptibleCall()};
  if (verb == "list" && id.empty()) return ListSessions(client, common, options);
  v1::Session session;
  grpc::Status status;
  if (verb == "create") {
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    if (ttl) request.set_idle_ttl_seconds(*ttl);
    status = client.CreateSession(request, &session, options);
  } else if (verb == "get" && !id.empty()) {
    status = client.GetSession(id, &session, options);
  } else if (verb == "delete" && !id.empty()) {
    status = client.DeleteSession(id, options);
    if (!status.ok()) return Report(status, common);
    std::cout << (common.json ? Dump({{"deleted", id}}) : "deleted " + id) << std::endl;
    return kExitOk;
  } else {
    return UsageError("sessions: expected list, create [ID], get ID or delete ID");
  }
  if (!status.ok()) return Report(status, common);
  if (common.json) {
    std::cout << Dump(ToJson(session)) << std::endl;
  } else {
    Print(session);
  }
  return kExitOk;
}

int InfoCommand(const std::vector<std::string>& arguments) {
  Common common;
  Args args;
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla info: what the server serves\n" << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("info: unexpected \"" + words[0] + "\"");
  Client client(common.target);
  v1::GetModelInfoResponse info;
  const grpc::Status status = client.GetModelInfo(&info, {common.timeout, InterruptibleCall()});
  if (!status.ok()) return Report(status, common);
  nlohmann::ordered_json json = {{"model", info.model()},
                                 {"family", info.family()},
                                 {"parameters", info.parameters()},
                                 {"vocab_size", info.vocab_size()},
                                 {"num_layers", info.num_layers()},
                                 {"hidden_size", info.hidden_size()},
                                 {"dtype", info.dtype()},
                                 {"state_dtype", info.state_dtype()},
                                 {"weight_bytes", info.weight_bytes()},
                                 {"state_bytes_per_session", info.state_bytes_per_session()},
                                 {"capacity_sessions", info.capacity_sessions()},
                                 {"sessions", info.sessions()},
                                 {"max_num_seqs", info.max_num_seqs()},
                                 {"max_prompt_tokens", info.max_prompt_tokens()},
                                 {"max_new_tokens", info.max_new_tokens()},
                                 {"prefill_form", info.prefill_form()},
                                 {"bos_token_id", info.bos_token_id()},
                                 {"eos_token_id", info.eos_token_id()},
                                 {"backend", info.backend()},
                                 {"device", info.device()},
                                 {"version", info.version()},
                                 {"replica_id", info.replica_id()}};
  if (common.json) {
    std::cout << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
    return kExitOk;
  }
  for (const auto& [key, value] : json.items()) {
    std::printf("%-24s %s\n", key.c_str(),
                value.is_string() ? value.get<std::string>().c_str() : value.dump().c_str());
  }
  return kExitOk;
}

int HealthCommand(const std::vector<std::string>& arguments) {
  Common common;
  std::string service;
  Args args;
  args.Add("service", &service, "one service by its full name; default: the whole server");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla health: exit 0 when serving, 1 when not, 3 when unreachable\n" << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("health: unexpected \"" + words[0] + "\"");
  Client client(common.target);
  bool serving = false;
  const grpc::Status status =
      client.Health(service, &serving, {common.timeout > 0 ? common.timeout : 5, nullptr});
  if (!status.ok()) return Report(status, common);
  const std::string answer = serving ? "SERVING" : "NOT_SERVING";
  std::cout << (common.json ? Dump({{"status", answer}}) : answer) << std::endl;
  return serving ? kExitOk : kExitFailed;
}

}  // namespace gla
