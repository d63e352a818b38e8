//! Tokenizers: their files, and texts through good ones.

use std::sync::OnceLock;

use engine::tokenizer::{Detokenizer, Guard, Tokenizer};
use engine::weights::HfTokenizer;
use serde_json::Map;

use super::goldens;
use super::parts;

/// A `tokenizer.json`, and behind it a text for it.
pub fn tokenizer_json(bytes: &[u8]) {
    let [json, text] = parts(bytes);
    let files = HfTokenizer {
        tokenizer_json: json.to_vec(),
        tokenizer_config: Map::new(),
        special_tokens_map: Map::new(),
        eos_ids: vec![u32::MAX, 5],
        bos_id: Some(1),
    };
    let Ok(tokenizer) = Tokenizer::from_hf(&files) else { return };
    exercise(&tokenizer, &String::from_utf8_lossy(&text[..text.len().min(TEXT_BYTES_MAX)]));
}

/// Edits of good GGUF metadata, one a line, and behind them a text. The first byte says which
/// vocabulary is edited.
pub fn gguf_tokenizer(bytes: &[u8]) {
    let [edits, text] = parts(bytes);
    let Some((&which, edits)) = edits.split_first() else { return };
    let mut metadata = metadata()[usize::from(which) % 3].clone();
    for edit in edits.split(|&byte| byte == b'\n').take(EDITS_MAX) {
        let [kind, high, low, rest @ ..] = edit else { continue };
        let id = usize::from(*high) << 8 | usize::from(*low);
        let at = id % metadata.tokens.len().max(1);
        let text = String::from_utf8_lossy(rest).into_owned();
        let number = rest.first().copied().unwrap_or(0);
        match kind {
            b't' => metadata.tokens.iter_mut().skip(at).take(1).for_each(|t| *t = text.clone()),
            b'k' => metadata.token_types.iter_mut().skip(at).take(1).for_each(|t| {
                *t = i32::from(number) - i32::from(b'0');
            }),
            b'K' => metadata.token_types.iter_mut().skip(at).for_each(|t| {
                *t = i32::from(number) - i32::from(b'0');
            }),
            b's' => metadata.scores.iter_mut().skip(at).take(1).for_each(|s| *s = score(number)),
            b'S' => metadata.scores.iter_mut().skip(at).for_each(|s| *s = score(number)),
            b'm' => metadata.merges.push(text),
            b'M' => metadata.merges.truncate(id),
            b'a' => {
                metadata.tokens.push(text);
                metadata.token_types.push(i32::from(*high) - i32::from(b'0'));
                metadata.scores.push(score(*low));
            }
            b'x' => metadata.tokens.truncate(id),
            b'p' => metadata.pre = Some(text),
            b'P' => metadata.model = text,
            b'b' => metadata.bos = Some(id as u32),
            b'e' => metadata.eos = Some(id as u32),
            b'u' => metadata.unk = Some(id as u32),
            b'f' => {
                let flag =
                    |bit: u8| (low >> (2 * bit + 1) & 1 == 1).then_some(low >> (2 * bit) & 1 == 1);
                metadata.add_bos = flag(0);
                metadata.add_eos = flag(1);
                metadata.add_space_prefix = flag(2);
            }
            _ => {}
        }
    }
    let unknown = metadata.unk;
    let Ok(tokenizer) = Tokenizer::from_gguf(&metadata) else { return };
    let text = String::from_utf8_lossy(&text[..text.len().min(TEXT_BYTES_MAX)]);
    exercise(&tokenizer, &text);
    let ids = tokenizer.encode(&text, false).expect("metadata leaves nothing to fail");
    let unknown = |id: &u32| Some(*id) == unknown || tokenizer.token_bytes(*id) == b"<unk>";
    let special = ids.iter().find(|&id| tokenizer.is_special(*id) && !unknown(id));
    assert_eq!(special, None, "{text:?} became special");
}

/// Two texts through a good tokenizer; the first byte says which.
pub fn encode(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let which = usize::from(which) % tokenizers().len();
    let (tokenizer, exact) = &tokenizers()[which];
    let [first, second] = parts(&bytes[..bytes.len().min(TEXT_BYTES_MAX)]);
    let texts = [first, second].map(String::from_utf8_lossy);
    let whole = texts.concat();
    let ids = tokenizer.encode(&whole, false).expect("a good tokenizer");
    assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{whole:?} became special");
    let guard = Guard::new(tokenizer, [whole.as_str()]).expect("a free mark");
    let protected = tokenizer.encode_template(&guard.protect(&whole), &guard).expect("good");
    assert_eq!(protected, ids, "{whole:?} with marks");
    let joined = texts.map(|text| guard.protect(&text)).concat();
    let joined = tokenizer.encode_template(&joined, &guard).expect("a good tokenizer");
    assert!(!joined.iter().any(|&id| tokenizer.is_special(id)), "{whole:?} joined");
    if *exact {
        assert_eq!(tokenizer.decode(&ids, false), whole);
        assert_eq!(tokenizer.decode(&joined, false), whole);
    }
}

/// Token ids, two bytes each, through a good tokenizer; the first byte says which.
pub fn detokenize(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let (tokenizer, _) = &tokenizers()[usize::from(which) % tokenizers().len()];
    let skip = which >= 128;
    let ids: Vec<u32> =
        bytes.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).collect();
    let mut stream = Detokenizer::new(tokenizer.clone(), skip);
    let mut text = String::new();
    for &id in &ids {
        text.push_str(&stream.push(id));
    }
    text.push_str(&stream.finish());
    assert_eq!(text, tokenizer.decode(&ids, skip));
    // the same without a state: all bytes, then text
    let shown = ids.iter().filter(|&&id| !(skip && tokenizer.is_special(id)));
    let all: Vec<u8> = shown.flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
    let whole = String::from_utf8_lossy(&all);
    let whole = match which % 5 {
        3 | 4 => whole.strip_prefix(' ').unwrap_or(&whole),
        _ => &whole,
    };
    assert_eq!(text, whole);
}

/// Uses everything of a tokenizer.
pub fn exercise(tokenizer: &Tokenizer, text: &str) {
    for around in [false, true] {
        if let Ok(ids) = tokenizer.encode(text, around) {
            tokenizer.decode(&ids, around);
        }
    }
    if let Ok(guard) = Guard::new(tokenizer, [text]) {
        let _ = tokenizer.encode_template(&guard.protect(text), &guard);
        let _ = tokenizer.encode_template(text, &guard);
    }
    let ends = tokenizer.end_of_generation().iter().copied();
    for id in [0, 1, tokenizer.vocab_size() as u32, u32::MAX].into_iter().chain(ends) {
        tokenizer.token_bytes(id);
        tokenizer.is_special(id);
    }
}

/// Good tokenizers, and whether every text comes back from them as it was.
pub fn tokenizers() -> &'static [(Tokenizer, bool); 5] {
    static TOKENIZERS: OnceLock<[(Tokenizer, bool); 5]> = OnceLock::new();
    TOKENIZERS.get_or_init(|| {
        let all = goldens::goldens("tokenizers");
        [
            (goldens::hf(&all["llama3"]), true),
            (goldens::hf(&all["gpt2"]), true),
            (goldens::hf(&all["qwen2"]), false),
            (goldens::hf(&all["metaspace"]), false),
            (goldens::gguf(&all["spm"]), false),
        ]
    })
}

fn metadata() -> &'static [engine::weights::GgufTokenizer; 3] {
    static METADATA: OnceLock<[engine::weights::GgufTokenizer; 3]> = OnceLock::new();
    METADATA.get_or_init(|| {
        let all = goldens::goldens("tokenizers");
        ["llama3", "qwen2", "spm"].map(|name| goldens::gguf_metadata(&all[name]))
    })
}

fn score(byte: u8) -> f32 {
    match byte {
        0xfe => f32::NAN,
        0xfd => f32::INFINITY,
        0xfc => f32::NEG_INFINITY,
        byte => f32::from(byte as i8) / 4.0,
    }
}

const TEXT_BYTES_MAX: usize = 4_096;
const EDITS_MAX: usize = 64;
