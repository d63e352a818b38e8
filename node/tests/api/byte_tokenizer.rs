//! A tokenizer for replicas that run no model. Also the benchmark's of the cost of a hop.

use engine::tokenizer::Tokenizer;
use engine::weights::GgufTokenizer;

/// Three special tokens, then the 256 bytes.
pub fn byte_tokenizer() -> Tokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let mut token_types = vec![2, 3, 3];
    token_types.extend([6; 256]);
    Tokenizer::from_gguf(&GgufTokenizer {
        model: "llama".to_owned(),
        pre: None,
        scores: vec![0.0; tokens.len()],
        tokens,
        token_types,
        merges: Vec::new(),
        bos: Some(1),
        eos: Some(2),
        eot: None,
        eom: None,
        unk: Some(0),
        sep: None,
        pad: None,
        add_bos: Some(true),
        add_eos: Some(false),
        add_space_prefix: Some(false),
        remove_extra_whitespaces: Some(false),
    })
    .expect("a vocabulary of bytes is valid")
}
