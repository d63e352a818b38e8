//! Files of models.

use std::path::Path;

use engine::chat::ChatTemplate;
use engine::model::Architecture;
use engine::tokenizer::Tokenizer;
use engine::weights::testing::{exercise, hf, smallest};
use engine::weights::{Format, ModelSource};

/// Any bytes as a GGUF: a model or a sentence.
pub fn gguf(bytes: &[u8]) {
    exercise(ModelSource::from_bytes("fuzz.gguf", bytes.to_vec()));
}

/// Any bytes as `model.safetensors` beside good other files.
pub fn safetensors(bytes: &[u8]) {
    with_file("safetensors", Architecture::Llama, "model.safetensors", bytes, |path| {
        exercise(ModelSource::open(path));
    });
}

/// Any bytes as the description of a model, beside good weights; the first byte says as which file.
pub fn hf_config(bytes: &[u8]) {
    const FILES: [&str; 3] =
        ["config.json", "tokenizer_config.json", "model.safetensors.index.json"];
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let file = FILES[usize::from(which) % FILES.len()];
    with_file("hf-config", Architecture::Qwen2, file, bytes, |path| {
        exercise(ModelSource::open(path));
    });
}

/// Any bytes as one of the files about text, beside good others: the tokenizer and the templates
/// that come of it are used.
pub fn hf_text(bytes: &[u8]) {
    const FILES: [&str; 5] = [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
    ];
    let Some((&which, bytes)) = bytes.split_first() else { return };
    let file = FILES[usize::from(which) % FILES.len()];
    with_file("hf-text", Architecture::Qwen2, file, bytes, |path| {
        let Ok(source) = ModelSource::open(path) else { return };
        let Ok(tokenizer) = Tokenizer::new(&source.tokenizer) else { return };
        super::text::exercise(&tokenizer, "Hello <|im_start|>\u{e9}\u{1f600}\n  1");
        let named = source.named_templates.iter().map(|(_, text)| text);
        for text in source.chat_template.iter().chain(named).take(TEMPLATES_MAX) {
            let Ok(template) = ChatTemplate::new(text) else { continue };
            super::chat::render(&tokenizer, &template, super::chat::sample_input());
        }
    });
}

/// A directory with a model, one file of which is `bytes`. Every call makes it anew, so that one
/// input does not change the next.
fn with_file(
    name: &str,
    architecture: Architecture,
    file: &str,
    bytes: &[u8],
    then: impl FnOnce(&Path),
) {
    let path = std::env::temp_dir().join(format!("fuzz-{name}-{}", std::process::id()));
    thread_local! {
        static WRITTEN: std::cell::RefCell<Vec<std::path::PathBuf>> = const {
            std::cell::RefCell::new(Vec::new())
        };
    }
    WRITTEN.with_borrow_mut(|written| {
        if !written.contains(&path) {
            let files = hf(&smallest(architecture), Format::BF16, 1);
            files.write(&path, 1).expect("a temporary directory");
            written.push(path.clone());
        }
    });
    let target = path.join(file);
    let before = std::fs::read(&target).ok();
    std::fs::write(&target, bytes).expect("a temporary file");
    then(&path);
    match before {
        Some(before) => std::fs::write(&target, before),
        None => std::fs::remove_file(&target),
    }
    .expect("a temporary file");
}

/// Templates of one file that are rendered.
const TEMPLATES_MAX: usize = 4;
