// SessionService and Converse over a real socket.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "test_server.h"

namespace gla {
namespace {

using testing::HasSubstr;

class SessionTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer(); }
  static void TearDownTestSuite() { delete server_; }

  grpc::Status Create(const std::string& id, v1::Session* session) {
    grpc::ClientContext context;
    v1::CreateSessionRequest request;
    request.set_session_id(id);
    return server_->sessions->CreateSession(&context, request, session);
  }
  grpc::Status Get(const std::string& id, v1::Session* session) {
    grpc::ClientContext context;
    v1::GetSessionRequest request;
    request.set_session_id(id);
    return server_->sessions->GetSession(&context, request, session);
  }
  grpc::Status Delete(const std::string& id) {
    grpc::ClientContext context;
    v1::DeleteSessionRequest request;
    request.set_session_id(id);
    v1::DeleteSessionResponse response;
    return server_->sessions->DeleteSession(&context, request, &response);
  }
  v1::ListSessionsResponse List(int page_size, const std::string& token) {
    grpc::ClientContext context;
    v1::ListSessionsRequest request;
    request.set_page_size(page_size);
    request.set_page_token(token);
    v1::ListSessionsResponse response;
    EXPECT_TRUE(server_->sessions->ListSessions(&context, request, &response).ok());
    return response;
  }
  v1::GenerateRequest OnSession(const std::string& id, const std::vector<int>& ids, int n) {
    v1::GenerateRequest request = Greedy(ids, n);
    request.set_session_id(id);
    return request;
  }

  static TestServer* server_;
};
TestServer* SessionTest::server_ = nullptr;

TEST_F(SessionTest, CreateGetDelete) {
  v1::Session session;
  ASSERT_TRUE(Create("", &session).ok());
  EXPECT_EQ(session.session_id().size(), 32u);
  EXPECT_EQ(session.position(), 0);
  EXPECT_EQ(session.idle_ttl_seconds(), 900);
  v1::Session found;
  ASSERT_TRUE(Get(session.session_id(), &found).ok());
  EXPECT_EQ(found.session_id(), session.session_id());
  EXPECT_TRUE(Delete(session.session_id()).ok());
  EXPECT_EQ(Get(session.session_id(), &found).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Delete(session.session_id()).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(SessionTest, ATakenIdAlreadyExists) {
  v1::Session session;
  ASSERT_TRUE(Create("taken", &session).ok());
  EXPECT_EQ(Create("taken", &session).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_TRUE(Delete("taken").ok());
}

TEST_F(SessionTest, BadFieldsAreInvalidArgument) {
  v1::Session session;
  EXPECT_THAT(Create("no spaces", &session).error_message(), HasSubstr("session_id: expected"));
  EXPECT_THAT(Create(std::string(129, 'a'), &session).error_message(), HasSubstr("1 .. 128"));
  EXPECT_EQ(Get("", &session).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Delete("a/b").error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  grpc::ClientContext first, second, third;
  v1::CreateSessionRequest create;
  create.set_idle_ttl_seconds(-1);
  EXPECT_THAT(server_->sessions->CreateSession(&first, create, &session).error_message(),
              HasSubstr("idle_ttl_seconds: expected 0 or more, got -1"));
  v1::ListSessionsRequest list;
  v1::ListSessionsResponse listed;
  list.set_page_size(1001);
  EXPECT_THAT(server_->sessions->ListSessions(&second, list, &listed).error_message(),
              HasSubstr("page_size: expected 0 .. 1000, got 1001"));
  list.set_page_size(1);
  list.set_page_token("not a token");
  EXPECT_THAT(server_->sessions->ListSessions(&third, list, &listed).error_message(),
              HasSubstr("page_token"));
}

TEST_F(SessionTest, ListPagesAreDisjointAndComplete) {
  v1::Session session;
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Create("page-" + std::to_string(i), &session).ok());
  std::vector<std::string> seen;
  std::string token;
  do {
    const v1::ListSessionsResponse page = List(2, token);
    EXPECT_EQ(page.total(), 5);
    EXPECT_LE(page.sessions_size(), 2);
    for (const v1::Session& s : page.sessions()) seen.push_back(s.session_id());
    token = page.next_page_token();
  } while (!token.empty());
  EXPECT_THAT(seen, testing::ElementsAre("page-0", "page-1", "page-2", "page-3", "page-4"));
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(Delete("page-" + std::to_string(i)).ok());
}

TEST_F(SessionTest, TurnsContinueOneText) {
  v1::Session session;
  ASSERT_TRUE(Create("turns", &session).ok());
  const Answer first = Generate(*server_, OnSession("turns", {1, 10, 20}, 5));
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  EXPECT_EQ(first.finish.session_position(), 8);
  const Answer second = Generate(*server_, OnSession("turns", {30, 40}, 5));
  EXPECT_EQ(second.finish.usage().tokens_restored(), 8);
  EXPECT_EQ(second.finish.usage().tokens_prefilled(), 2);
  EXPECT_EQ(second.finish.session_position(), 15);

  std::vector<int> whole = {1, 10, 20};
  whole.insert(whole.end(), first.token_ids.begin(), first.token_ids.end());
  whole.insert(whole.end(), {30, 40});
  EXPECT_EQ(Generate(*server_, Greedy(whole, 5)).token_ids, second.token_ids);
  EXPECT_TRUE(Delete("turns").ok());
}

TEST_F(SessionTest, AStalePositionOrASecondWriterIsAborted) {
  v1::Session session;
  ASSERT_TRUE(Create("busy", &session).ok());
  v1::GenerateRequest stale = OnSession("busy", {1}, 1);
  stale.set_expected_position(7);
  const Answer refused = Generate(*server_, stale);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::ABORTED);

  grpc::ClientContext context;
  const auto writer = server_->inference->Generate(&context, OnSession("busy", {1}, 8000));
  v1::GenerateResponse message;
  ASSERT_TRUE(writer->Read(&message));
  ASSERT_TRUE(Get("busy", &session).ok());
  EXPECT_TRUE(session.busy());
  EXPECT_EQ(Generate(*server_, OnSession("busy", {1}, 1)).status.error_code(),
            grpc::StatusCode::ABORTED);
  // Deleting it ends the writer.
  EXPECT_TRUE(Delete("busy").ok());
  while (writer->Read(&message)) {
  }
  EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(SessionTest, AnErrorOnASessionTellsItsPosition) {
  v1::Session session;
  ASSERT_TRUE(Create("told", &session).ok());
  const Answer answer = Generate(*server_, OnSession("told", {1}, 8192), 0.2);
  ASSERT_EQ(answer.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ASSERT_TRUE(WaitFor([&] { return Get("told", &session).ok() && !session.busy(); }));
  EXPECT_GT(session.position(), 1);
  EXPECT_TRUE(Delete("told").ok());
}

TEST_F(SessionTest, UnknownSessionIsNotFound) {
  EXPECT_EQ(Generate(*server_, OnSession("nobody", {1}, 1)).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
}

// Converse.

class Conversation {
 public:
  explicit Conversation(TestServer& server) : stream_(server.inference->Converse(&context_)) {}

  v1::Session Open(const v1::ConverseOpen& open) {
    v1::ConverseRequest request;
    *request.mutable_open() = open;
    EXPECT_TRUE(stream_->Write(request));
    v1::ConverseResponse response;
    EXPECT_TRUE(stream_->Read(&response));
    EXPECT_TRUE(response.has_opened());
    return response.opened();
  }
  void Send(const std::vector<int>& ids, int max_new_tokens) {
    v1::ConverseRequest request;
    request.mutable_turn()->mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
    request.mutable_turn()->set_max_new_tokens(max_new_tokens);
    request.mutable_turn()->set_ignore_eos(true);
    stream_->Write(request);
  }
  void SendCancel() {
    v1::ConverseRequest request;
    request.mutable_cancel();
    stream_->Write(request);
  }
  bool Read(v1::ConverseResponse* response) { return stream_->Read(response); }
  // The messages up to the finish, as one.
  v1::GenerateResponse ReadTurn() {
    v1::GenerateResponse whole;
    v1::ConverseResponse response;
    while (!whole.has_finish() && stream_->Read(&response)) whole.MergeFrom(response.output());
    return whole;
  }
  grpc::Status Close() {
    stream_->WritesDone();
    v1::ConverseResponse response;
    while (stream_->Read(&response)) {
    }
    return stream_->Finish();
  }
  void Cancel() { context_.TryCancel(); }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ConverseRequest, v1::ConverseResponse>> stream_;
};

v1::ConverseOpen GreedyOpen(const std::string& id = "") {
  v1::ConverseOpen open;
  open.set_session_id(id);
  open.mutable_sampling()->set_temperature(0);
  return open;
}

TEST_F(SessionTest, ConverseRunsTurnAfterTurnOnASessionOfItsOwn) {
  Conversation conversation(*server_);
  const v1::Session session = conversation.Open(GreedyOpen());
  conversation.Send({1, 10, 20}, 5);
  const v1::GenerateResponse first = conversation.ReadTurn();
  EXPECT_EQ(first.token_ids_size(), 5);
  EXPECT_EQ(first.finish().session_id(), session.session_id());
  EXPECT_EQ(first.finish().session_position(), 8);
  conversation.Send({30, 40}, 5);
  const v1::GenerateResponse second = conversation.ReadTurn();
  EXPECT_EQ(second.finish().usage().tokens_restored(), 8);
  std::vector<int> whole = {1, 10, 20};
  whole.insert(whole.end(), first.token_ids().begin(), first.token_ids().end());
  whole.insert(whole.end(), {30, 40});
  EXPECT_THAT(std::vector<int>(second.token_ids().begin(), second.token_ids().end()),
              testing::ElementsAreArray(Generate(*server_, Greedy(whole, 5)).token_ids));
  EXPECT_TRUE(conversation.Close().ok());
  v1::Session gone;
  EXPECT_TRUE(WaitFor([&] { return !Get(session.session_id(), &gone).ok(); }));
}

TEST_F(SessionTest, ConverseKeepsASessionWhenAsked) {
  v1::ConverseOpen open = GreedyOpen();
  open.set_keep(true);
  Conversation conversation(*server_);
  const std::string id = conversation.Open(open).session_id();
  conversation.Send({1}, 2);
  conversation.ReadTurn();
  EXPECT_TRUE(conversation.Close().ok());
  Conversation again(*server_);
  EXPECT_EQ(again.Open(GreedyOpen(id)).position(), 3);
  EXPECT_TRUE(again.Close().ok());
  v1::Session session;
  EXPECT_TRUE(Get(id, &session).ok());
  EXPECT_TRUE(Delete(id).ok());
}

TEST_F(SessionTest, ConverseCancelsATurnAndGoesOn) {
  Conversation conversation(*server_);
  conversation.Open(GreedyOpen());
  conversation.Send({1}, 8000);
  v1::ConverseResponse response;
  ASSERT_TRUE(conversation.Read(&response));
  conversation.SendCancel();
  const v1::GenerateResponse cancelled = conversation.ReadTurn();
  EXPECT_EQ(cancelled.finish().reason(), v1::FINISH_REASON_CANCELLED);
  // What the session has consumed: the last token given may not have been fed any more.
  const int64_t tokens = cancelled.token_ids_size() + response.output().token_ids_size();
  EXPECT_THAT(cancelled.finish().session_position(), testing::AnyOf(tokens, tokens + 1));
  conversation.SendCancel();  // nothing runs: no effect
  conversation.Send({5}, 3);
  EXPECT_EQ(conversation.ReadTurn().finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_TRUE(conversation.Close().ok());
}

TEST_F(SessionTest, ConverseRefusesWhatIsOutOfOrder) {
  {
    Conversation conversation(*server_);
    conversation.Send({1}, 1);
    const grpc::Status status = conversation.Close();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("turn: expected open first"));
  }
  {
    Conversation conversation(*server_);
    conversation.Open(GreedyOpen());
    v1::ConverseResponse response;
    conversation.Send({1}, 8000);
    ASSERT_TRUE(conversation.Read(&response));
    conversation.Send({1}, 1);
    EXPECT_THAT(conversation.Close().error_message(), HasSubstr("turn: expected after the finish"));
  }
  {
    Conversation conversation(*server_);
    EXPECT_EQ(conversation.Close().error_code(), grpc::StatusCode::OK);
  }
  EXPECT_TRUE(WaitFor([&] { return server_->Metric("gla_requests_running") == 0; }));
  EXPECT_TRUE(WaitFor([&] { return List(0, "").total() == 0; }));
}

TEST_F(SessionTest, ConverseEndsWithTheErrorOfItsTurn) {
  Conversation conversation(*server_);
  conversation.Open(GreedyOpen());
  conversation.Send({9999}, 1);
  const grpc::Status status = conversation.Close();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("got 9999"));
}

TEST_F(SessionTest, ConverseOnAnUnknownSessionIsNotFound) {
  grpc::ClientContext context;
  const auto stream = server_->inference->Converse(&context);
  v1::ConverseRequest request;
  request.mutable_open()->set_session_id("nobody");
  stream->Write(request);
  v1::ConverseResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(SessionTest, ConverseThatIsCancelledFreesItsSession) {
  Conversation conversation(*server_);
  conversation.Open(GreedyOpen());
  conversation.Send({1}, 8000);
  v1::ConverseResponse response;
  ASSERT_TRUE(conversation.Read(&response));
  conversation.Cancel();
  EXPECT_TRUE(WaitFor([&] { return List(0, "").total() == 0; }));
  EXPECT_EQ(conversation.Close().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(SessionTest, ConverseTurnsSentBlindlyEachGetTheirAnswer) {
  Conversation conversation(*server_);
  conversation.Open(GreedyOpen());
  for (int turn = 0; turn < 20; ++turn) {
    conversation.Send({1 + turn}, 3);
    EXPECT_EQ(conversation.ReadTurn().token_ids_size(), 3);
  }
  EXPECT_TRUE(conversation.Close().ok());
}

}  // namespace
}  // namespace gla
