//! The built-in model answers: what docs/demo-model/expect.json says of it, by greedy decoding. A row
//! names texts of which the answer holds one; of a conversation the last answer counts.

use engine::chat::{Calendar, ChatInput, ChatTemplate};
use engine::executor::{Executor, ExecutorOptions, KvCapacity};
use engine::model::{Decoder, LoadOptions};
use engine::replica::{Event, FinishReason, GenerateRequest, Replica};
use engine::tokenizer::Tokenizer;
use engine::weights::ModelSource;
use kernels::isa::Isa;
use protocol::{Instant, RequestId};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct Demo {
    replica: Replica,
    template: ChatTemplate,
    requests: u128,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root").to_owned()
}

impl Demo {
    fn load() -> Self {
        let source = ModelSource::open(&root().join("node/assets/demo.gguf")).expect("opens");
        let tokenizer = Tokenizer::new(&source.tokenizer).expect("a usable tokenizer");
        let template = source.chat_template.as_deref().expect("it has a template");
        let template = ChatTemplate::new(template).expect("a usable template");
        let context = source.config.context;
        let options =
            LoadOptions { isa: Isa::detect(), threads: 2, quant: None, progress: &mut |_| {} };
        let decoder = Decoder::load(Arc::new(source), options).expect("loads");
        let options = ExecutorOptions {
            kv_capacity: KvCapacity::Blocks(256),
            threads: 2,
            ..ExecutorOptions::default()
        };
        let executor = Executor::new(decoder, &options).expect("memory for 256 blocks");
        let digest = executor.identity().digest();
        let identity = cache::NumericalIdentity::new(&cache::IdentityParts {
            weights: &digest,
            architecture: "llama",
            kv_dtype: "f16",
            rope: "",
            adapter: "",
        });
        let config = scheduler::BatcherConfig::new(256, context, identity);
        let replica = Replica::new(executor, tokenizer, config, [7; 32]).expect("valid settings");
        Demo { replica, template, requests: 0 }
    }

    /// What a user says, turn by turn; the last answer.
    fn converse(&mut self, turns: &[Value]) -> (String, bool) {
        let mut messages = Vec::new();
        let mut last = (String::new(), false);
        for turn in turns {
            messages.push(json!({ "role": "user", "content": turn }));
            last = self.ask(&messages);
            messages.push(json!({ "role": "assistant", "content": last.0 }));
        }
        last
    }

    /// The greedy answer, and whether the model ended it by itself.
    fn ask(&mut self, messages: &[Value]) -> (String, bool) {
        let input = ChatInput {
            messages,
            tools: &[],
            documents: &[],
            add_generation_prompt: true,
            variables: &serde_json::Map::new(),
            now: Calendar::from_unix_s(0),
        };
        let prompt = self.template.render(self.replica.tokenizer(), &input).expect("renders");
        self.requests += 1;
        let request = GenerateRequest {
            max_tokens: Some(400),
            ..GenerateRequest::new(RequestId(self.requests), prompt.tokens)
        };
        self.replica.generate(Instant::ORIGIN, request).expect("accepted");
        let (mut answer, mut ended) = (String::new(), false);
        let mut events = Vec::new();
        while self.replica.has_work() {
            self.replica.step(&|| Instant::ORIGIN, &mut events);
            for (_, event) in events.drain(..) {
                match event {
                    Event::Token { text, .. } => answer.push_str(&text),
                    Event::Finished { text, reason, .. } => {
                        answer.push_str(&text);
                        ended = reason == FinishReason::Stop;
                    }
                    Event::Failed { error, .. } => panic!("{messages:?}: {error}"),
                    _ => {}
                }
            }
        }
        (answer, ended)
    }
}

#[test]
fn the_demo_model_answers() {
    let path = root().join("docs/demo-model/expect.json");
    let table: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(path).expect("a table")).expect("is JSON");
    assert!(table.len() >= 15, "a greeting, what Grapevine is, a dozen questions, a story");
    let mut demo = Demo::load();
    let mut wrong = Vec::new();
    for row in &table {
        let prompt = &row["prompt"];
        let (answer, ended) = match prompt.as_array() {
            Some(turns) => demo.converse(turns),
            None => demo.converse(std::slice::from_ref(prompt)),
        };
        let wanted = row["contains"].as_array().expect("a list of texts");
        let has = |text: &Value| text.as_str().is_some_and(|text| answer.contains(text));
        let words = answer.split_whitespace().count() as u64;
        let enough = row["min_words"].as_u64().is_none_or(|min| words >= min);
        if !ended || !enough || !(wanted.is_empty() || wanted.iter().any(has)) {
            wrong.push(format!("{prompt} wants {wanted:?}, ended {ended}: {answer:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), table.len(), wrong.join("\n"));
}

#[test]
fn a_second_turn_reuses_the_first() {
    let mut demo = Demo::load();
    let first =
        json!({ "role": "user", "content": "What is Grapevine, and how do I start a node?" });
    let (answer, _) = demo.ask(std::slice::from_ref(&first));
    let before = demo.replica.stats().prefix_hit_tokens;
    let second = json!({ "role": "user", "content": "Thank you!" });
    let (thanks, _) = demo.ask(&[first, json!({ "role": "assistant", "content": answer }), second]);
    assert!(!thanks.trim().is_empty());
    assert!(demo.replica.stats().prefix_hit_tokens > before, "the first turn was in the cache");
}
