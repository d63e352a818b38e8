//! Any bytes as a GGUF: a model or a sentence, never a panic.
#![no_main]

use engine::weights::ModelSource;
use engine::weights::testing::exercise;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    exercise(ModelSource::from_bytes("fuzz.gguf", bytes.to_vec()));
});
