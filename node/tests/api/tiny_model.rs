//! A small random model behind the real engine.

use std::sync::Arc;

use cache::{IdentityParts, NumericalIdentity};
use engine::chat::ChatTemplate;
use engine::executor::{Executor, ExecutorOptions, KvCapacity};
use engine::model::{Architecture, Decoder, LoadOptions};
use engine::replica::Replica;
use engine::tokenizer::Tokenizer;
use engine::weights::testing::{gguf, tiny};
use engine::weights::{Format, ModelSource};
use kernels::isa::Isa;
use scheduler::BatcherConfig;

const BLOCKS: usize = 256;

/// The replica, its template and the width of its hidden states.
pub fn load(architecture: Architecture) -> (Replica, ChatTemplate, usize) {
    let file = tempfile::NamedTempFile::new().expect("a place for a file");
    let bytes = gguf(&tiny(architecture), Format::Q8_0, 7).bytes();
    std::fs::write(file.path(), bytes).expect("the file is written");
    let source = ModelSource::open(file.path()).expect("a valid model");
    let tokenizer = Tokenizer::new(&source.tokenizer).expect("its tokenizer");
    let template = source.chat_template.as_deref().expect("its template");
    let template = ChatTemplate::new(template).expect("its template compiles");
    let (hidden, context) = (source.config.hidden, source.config.context);
    let mut progress = |_| {};
    let options =
        LoadOptions { isa: Isa::detect(), threads: 1, quant: None, progress: &mut progress };
    let decoder = Decoder::load(Arc::new(source), options).expect("its weights");
    let options = ExecutorOptions {
        kv_capacity: KvCapacity::Blocks(BLOCKS),
        threads: 1,
        ..ExecutorOptions::default()
    };
    let executor = Executor::new(decoder, &options).expect("an executor");
    let identity = NumericalIdentity::new(&IdentityParts {
        weights: &executor.identity().digest(),
        architecture: "tiny",
        kv_dtype: "f16",
        rope: "",
        adapter: "",
    });
    let config = BatcherConfig::new(BLOCKS as u32, context, identity);
    let replica = Replica::new(executor, tokenizer, config, [7; 32]).expect("a replica");
    (replica, template, hidden)
}
