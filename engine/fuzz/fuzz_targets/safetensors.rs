//! Any bytes as `model.safetensors` beside a good `config.json`.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use engine::model::Architecture;
use engine::weights::testing::{exercise, hf, smallest};
use engine::weights::{Format, ModelSource};
use libfuzzer_sys::fuzz_target;

fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("fuzz-safetensors-{}", std::process::id()));
        let files = hf(&smallest(Architecture::Llama), Format::BF16, 1);
        files.write(&path, 1).expect("a temporary directory");
        path
    })
}

fuzz_target!(|bytes: &[u8]| {
    std::fs::write(directory().join("model.safetensors"), bytes).expect("written");
    exercise(ModelSource::open(directory()));
});
