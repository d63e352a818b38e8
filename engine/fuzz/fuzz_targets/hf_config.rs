//! Any bytes as `config.json`, `tokenizer_config.json` or the index, beside good weights; the
//! first byte says which.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use engine::model::Architecture;
use engine::weights::testing::{exercise, hf, smallest};
use engine::weights::{Format, ModelSource};
use libfuzzer_sys::fuzz_target;

fn directory(which: usize) -> &'static PathBuf {
    static DIRECTORIES: OnceLock<[PathBuf; 3]> = OnceLock::new();
    let make = |index: usize| {
        let name = format!("fuzz-hf-{}-{index}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let files = hf(&smallest(Architecture::Qwen2), Format::BF16, 1);
        files.write(&path, 1).expect("a temporary directory");
        path
    };
    &DIRECTORIES.get_or_init(|| [make(0), make(1), make(2)])[which]
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let which = usize::from(*which) % FILES.len();
    std::fs::write(directory(which).join(FILES[which]), bytes).expect("written");
    exercise(ModelSource::open(directory(which)));
});

const FILES: [&str; 3] = ["config.json", "tokenizer_config.json", "model.safetensors.index.json"];
