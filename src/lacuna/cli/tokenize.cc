#include "lacuna/cli/tool.h"
#include "lacuna/io/file.h"

namespace lacuna::cli {

void add_tokenize(Tool& tool) {
  auto* verb = tool.verb("tokenize", "Print the token ids of a text.",
                         {"lacuna tokenize models/llama --text prompt.txt",
                          "lacuna tokenize tokenizers/gpt2 --text prompt.txt --no-special --json"});
  struct Flags {
    std::string folder, text;
    bool no_special = false;
  };
  static Flags flags;
  verb->add_option("FOLDER", flags.folder,
                   "folder with tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe "
                   "or tokenizer.model")
      ->required();
  verb->add_option("--text", flags.text, "file to tokenise as a whole")->required();
  verb->add_flag("--no-special", flags.no_special,
                 "without the special tokens that the tokenizer adds");
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(flags.folder));
    LACUNA_TRY(const std::string text, io::read_text(flags.text));
    const auto ids = tokenizer->encode(text, !flags.no_special);
    std::string line;
    for (int32_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
    tool.print({{"verb", "tokenize"}, {"ids", ids}}, line + "\n");
    return {};
  });
}

}  // namespace lacuna::cli
