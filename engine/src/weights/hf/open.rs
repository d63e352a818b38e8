//! From a Hugging Face directory to an opened model.

use std::path::Path;

use serde_json::{Map, Value};

use super::HfTokenizer;
use super::json::{Object, read_file};
use crate::model::Architecture;
use crate::weights::source::{Naming, Templates};
use crate::weights::{ModelError, ModelSource, TokenizerSource};

/// Opens the model in `directory`.
pub(in crate::weights) fn open(directory: &Path) -> Result<ModelSource, ModelError> {
    let path = directory.join("config.json");
    let json = Object::read(&path)?.ok_or_else(|| ModelError::Unreadable {
        file: path,
        reason: "there is no such file; a model directory needs one".to_owned(),
    })?;
    let config = super::config::decoder_config(&json)?;
    let (files, places) = super::safetensors::read(directory)?;
    let tokenizer = tokenizer(directory, &json, config.vocab)?;
    let templates = chat_templates(directory, &tokenizer)?;
    let name = directory.canonicalize().ok();
    let name = name.as_deref().unwrap_or(directory).file_name();
    let source = ModelSource {
        name: name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        naming: Naming::Hf { mixtral: config.architecture == Architecture::Mixtral },
        config,
        eos_ids: tokenizer.eos_ids.clone(),
        tokenizer: TokenizerSource::Hf(Box::new(tokenizer)),
        chat_template: templates.default,
        named_templates: templates.named,
        files,
        places,
        digest: Default::default(),
    };
    let tied = source.config.tied_embeddings;
    source.check(|name| is_ignored(name, tied))
}

/// Tensors that some files carry and no one computes with.
fn is_ignored(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
}

fn tokenizer(directory: &Path, json: &Object, vocab: usize) -> Result<HfTokenizer, ModelError> {
    let path = directory.join("tokenizer.json");
    let Some(tokenizer_json) = read_file(&path, TOKENIZER_BYTES_MAX)? else {
        let reason = "there is no such file; save the model's fast tokenizer into the directory";
        return Err(ModelError::Unreadable { file: path, reason: reason.to_owned() });
    };
    let object = |name: &str| Object::read(&directory.join(name));
    let map = |name: &str| Ok(object(name)?.map(|object| object.map).unwrap_or_default());
    let generation = object("generation_config.json")?;
    let mut eos_ids = Vec::new();
    let mut bos_id = None;
    for source in generation.iter().chain([json]) {
        if eos_ids.is_empty() {
            eos_ids = token_ids(source, "eos_token_id", vocab)?;
        }
        if bos_id.is_none() {
            bos_id = token_ids(source, "bos_token_id", vocab)?.first().copied();
        }
    }
    Ok(HfTokenizer {
        tokenizer_json,
        tokenizer_config: map("tokenizer_config.json")?,
        special_tokens_map: map("special_tokens_map.json")?,
        eos_ids,
        bos_id,
    })
}

/// One token or an array of them.
fn token_ids(json: &Object, key: &str, vocab: usize) -> Result<Vec<u32>, ModelError> {
    let expected = format!("tokens, so whole numbers below {vocab}");
    let one = |value: &Value| {
        let id = value.as_u64().filter(|id| *id < vocab as u64)?;
        u32::try_from(id).ok()
    };
    let ids = json.optional(key, &expected, |value| match value.as_array() {
        Some(_) if value.as_array()?.len() > EOS_IDS_MAX => None,
        Some(ids) => ids.iter().map(one).collect(),
        None => one(value).map(|id| vec![id]),
    })?;
    Ok(ids.unwrap_or_default())
}

/// `chat_template.jinja` before `tokenizer_config.json`, where
/// it is one text or an array of named ones.
fn chat_templates(directory: &Path, tokenizer: &HfTokenizer) -> Result<Templates, ModelError> {
    let config = directory.join("tokenizer_config.json");
    let mut templates = configured_templates(&config, &tokenizer.tokenizer_config)?;
    let path = directory.join("chat_template.jinja");
    if let Some(text) = template_file(&path)? {
        templates.default = Some(text);
    }
    templates.named.sort();
    Ok(templates)
}

fn configured_templates(file: &Path, config: &Map<String, Value>) -> Result<Templates, ModelError> {
    let wrong = |value: &Value| ModelError::Config {
        file: file.to_owned(),
        key: "chat_template".to_owned(),
        value: super::json::shown(value),
        expected: "a text, or an array of objects with `name` and `template`".to_owned(),
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Templates::default()),
        Some(Value::String(text)) => {
            Ok(Templates { default: Some(text.clone()), named: Vec::new() })
        }
        Some(value @ Value::Array(items)) if items.len() <= TEMPLATES_MAX => {
            let mut templates = Templates::default();
            for item in items {
                let text = |key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
                match (text("name"), text("template")) {
                    (Some(name), Some(text)) if name == "default" => templates.default = Some(text),
                    (Some(name), Some(text)) => templates.named.push((name, text)),
                    _ => return Err(wrong(value)),
                }
            }
            Ok(templates)
        }
        Some(value) => Err(wrong(value)),
    }
}

fn template_file(path: &Path) -> Result<Option<String>, ModelError> {
    let Some(bytes) = read_file(path, TEMPLATE_BYTES_MAX)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|_| ModelError::File {
        file: path.to_owned(),
        reason: "it is not UTF-8".to_owned(),
    })
}

const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
const TEMPLATES_MAX: usize = 64;
const EOS_IDS_MAX: usize = 64;
