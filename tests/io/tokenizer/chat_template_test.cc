// Chat prompts as Jinja2 renders them (tools/golden/tokenizers.py), and templates that are refused.
#include "lacuna/io/tokenizer/chat_template.h"

#include "io/tokenizer/samples.h"

namespace lacuna::io {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::vector<ChatMessage> messages_of(const json& rows) {
  std::vector<ChatMessage> messages;
  for (const json& row : rows) messages.push_back({row.at("role"), row.at("content")});
  return messages;
}

TEST(ChatTemplate, RendersAsJinja) {
  int compared = 0;
  for (const json& row : golden().at("chats")) {
    if (!row.contains("template")) continue;  // the data folder's, below
    const auto chat =
        ChatTemplate::parse(row.at("template").get<std::string>(), row.at("bos").get<std::string>(),
                            row.at("eos").get<std::string>(), "golden");
    ASSERT_TRUE(chat.ok()) << chat.error().message;
    EXPECT_EQ(chat->kind(), row.at("kind").get<std::string>());
    EXPECT_EQ(chat->render(messages_of(row.at("messages"))), row.at("prompt")) << row["template"];
    ++compared;
  }
  EXPECT_EQ(compared, 20);
}

TEST(ChatTemplate, RendersAPublishedTemplateAsJinja) {
  LACUNA_NEEDS_DATA(folder, "tokenizers/qwen2");
  const ChatTemplate chat = ChatTemplate::open(folder).value();
  EXPECT_EQ(chat.kind(), "ChatML");
  int compared = 0;
  for (const json& row : golden().at("chats")) {
    if (!row.contains("data")) continue;
    EXPECT_EQ(chat.render(messages_of(row.at("messages"))), row.at("prompt"));
    ++compared;
  }
  EXPECT_EQ(compared, 4);
}

// Prompts that Transformers rendered with SmolLM2-Instruct's template. The template here is worded
// anew; its default system message is the model's.
TEST(ChatTemplate, PutsSmolLm2sSystemMessageFirst) {
  LACUNA_NEEDS_DATA(path, "models/smollm2-135m/reference.json");
  const ChatTemplate chat =
      ChatTemplate::parse(
          "{% for turn in messages %}{% if loop.first and turn['role'] != 'system' %}"
          "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by "
          "Hugging "
          "Face<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + turn['role'] + '\\n' + "
          "turn['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}",
          "<|im_start|>", "<|im_end|>", "smollm2")
          .value();
  int compared = 0;
  const json reference = json::parse(read_text(path).value());
  for (const json& prompt : reference.at("prompts")) {
    if (!prompt.contains("chat_user")) continue;
    EXPECT_EQ(chat.render({{"user", prompt.at("chat_user")}}), prompt.at("text"));
    ++compared;
  }
  EXPECT_EQ(compared, 3);
}

constexpr const char* kChatMl =
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}";

TEST(ChatTemplate, LiesInTheConfigOrInAFileOfItsOwn) {
  const auto folder = lacuna::testing::scratch_folder("chat");
  const auto prompt = [&] { return ChatTemplate::open(folder).value().render({{"user", "Hi"}}); };
  put_text(folder / "tokenizer_config.json", json{{"chat_template", kChatMl}}.dump());
  EXPECT_EQ(prompt(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  const json several = {{{"name", "tool_use"}, {"template", "{{ tools }}"}},
                        {{"name", "default"}, {"template", kChatMl}}};
  put_text(folder / "tokenizer_config.json", json{{"chat_template", several}}.dump());
  EXPECT_EQ(prompt(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  // The file is newer than the key, and wins; the tokens still come from the config.
  put_text(folder / "tokenizer_config.json",
           json{{"chat_template", "?"}, {"bos_token", {{"content", "<s>"}}}, {"eos_token", "</s>"}}
               .dump());
  put_text(folder / "chat_template.jinja",
           "{{ bos_token + '[INST] <<SYS>>' + messages[0]['content'] + eos_token }}");
  EXPECT_EQ(ChatTemplate::open(folder).value().render(
                {{"user", "Hi "}, {"assistant", "Yes."}, {"user", "So?"}}),
            "<s>[INST] Hi [/INST] Yes. </s><s>[INST] So? [/INST]");
}

TEST(ChatTemplate, PutsALlama3BosFirstThatIsSpelledOut) {
  const ChatTemplate chat = ChatTemplate::parse(
                                "{{ '<|begin_of_text|>' }}{% for m in messages %}"
                                "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
                                "m.content + '<|eot_id|>' }}{% endfor %}",
                                "", "", "golden")
                                .value();
  EXPECT_EQ(chat.render({{"user", " Hi"}}),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n Hi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnow) {
  for (const char* unknown :
       {"", "{{ messages }}", "{{ '<|user|>' + messages[0]['content'] + '<|end|>' }}",
        "{{ '[INST] ' + messages[0]['content'] + '[/INST]' }}",
        // ChatML's markers and others, or thoughts that are cut out of earlier answers
        "{{ '<|im_start|>' + x + '<|im_end|>' + '<|tool|>' }}",
        "{{ '<|im_start|>' + x.split('</think>')[1] + '<|im_end|>' }}",
        "{{ '<|start_header_id|><|end_header_id|><|eot_id|><|image|>' }}",
        "{{ '<|start_header_id|>' + x + '<|end_header_id|>' }}"}) {
    const std::string message =
        message_of(ChatTemplate::parse(unknown, "<s>", "</s>", "some/chat_template.jinja"));
    EXPECT_THAT(message, AllOf(HasSubstr("some/chat_template.jinja"), HasSubstr(unknown),
                               HasSubstr("ChatML"), HasSubstr("Llama-3"), HasSubstr("Llama-2")));
  }
}

TEST(ChatTemplate, SaysWhereItLooked) {
  const auto folder = lacuna::testing::scratch_folder("chat");
  EXPECT_THAT(message_of(ChatTemplate::open(folder)),
              AllOf(HasSubstr(folder.string()), HasSubstr("chat_template.jinja")));
  put_text(folder / "tokenizer_config.json", "{\"bos_token\": 3}");
  EXPECT_THAT(message_of(ChatTemplate::open(folder)),
              AllOf(HasSubstr("tokenizer_config.json"), HasSubstr("bos_token")));
}

}  // namespace
}  // namespace lacuna::io
