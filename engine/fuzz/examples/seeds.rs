//! Writes small valid files into `corpus/`, for the fuzzers to start from.

use std::path::Path;

use engine::weights::Format;
use engine::weights::testing::{ARCHITECTURES, gguf, hf, smallest};

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in ["gguf", "safetensors", "hf_config"] {
        std::fs::create_dir_all(corpus.join(target))?;
    }
    for architecture in ARCHITECTURES {
        let config = smallest(architecture);
        for format in [Format::F32, Format::Q8_0, Format::Q4_0] {
            let name = format!("gguf/{architecture}-{format}");
            std::fs::write(corpus.join(name), gguf(&config, format, 1).bytes())?;
        }
        let files = hf(&config, Format::BF16, 1);
        std::fs::write(corpus.join(format!("safetensors/{architecture}")), files.shard(0, 1))?;
        let with = |which: u8, text: String| [vec![which], text.into_bytes()].concat();
        let path = corpus.join(format!("hf_config/{architecture}"));
        std::fs::write(path, with(0, files.config.to_string()))?;
        let path = corpus.join(format!("hf_config/{architecture}-tokenizer"));
        std::fs::write(path, with(1, files.tokenizer_config.to_string()))?;
    }
    let index = "\u{2}{\"weight_map\":{\"model.norm.weight\":\"model.safetensors\"}}";
    std::fs::write(corpus.join("hf_config/index"), index)
}
