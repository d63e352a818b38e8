//! From a model's files to a model that serves, in the background.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use cache::Namer;
use engine::chat::{ChatTemplate, ToolFormat};
use engine::grammar::{GrammarCache, TokenizerEnv};
use engine::replica::{GenerateRequest, Replica};
use engine::tokenizer::Tokenizer;
use protocol::RequestId;

use crate::kv::KvPlane;
use crate::metrics::Metrics;
use crate::model::{Grammars, Model};
use crate::options::ModelOptions;
use crate::paced::Paced;
use crate::registry::{ModelState, Registry};
use crate::replica::{Core, ReplicaHandle, Work};

/// A model in memory, whose replica does not run yet.
pub struct Loaded {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    /// Width of the logits.
    pub vocab: usize,
    /// Width of an embedding.
    pub hidden: usize,
    /// Prompt and answer together.
    pub context_tokens_max: usize,
    /// Names weights and numerics.
    pub fingerprint: String,
    /// Bytes of keys and values that one token takes; 0 for one that has none.
    pub kv_bytes_per_token: usize,
    /// Names its KV blocks; without it the model exchanges none with other nodes.
    pub namer: Option<Namer>,
    pub core: Box<dyn Core>,
}

impl Loaded {
    /// A replica with what belongs to it. `hidden` is the width of its embeddings; `fingerprint`
    /// names weights and numerics.
    pub fn new(
        replica: Replica,
        template: ChatTemplate,
        hidden: usize,
        fingerprint: String,
    ) -> Loaded {
        Loaded {
            tokenizer: replica.tokenizer().clone(),
            template: Some(template),
            vocab: replica.executor().decoder().config().vocab,
            hidden,
            context_tokens_max: replica.tokens_max(),
            fingerprint,
            kv_bytes_per_token: replica.executor().token_bytes(),
            namer: Some(replica.namer()),
            core: Box::new(replica),
        }
    }
}

impl Loaded {
    /// The same with a pause after each step.
    pub fn paced(self, pause: Duration) -> Loaded {
        Loaded { core: Box::new(Paced { core: self.core, pause }), ..self }
    }
}

/// How far a model is, for progress bars.
#[derive(Clone, Debug)]
pub struct LoadProgress<'a> {
    pub model: &'a str,
    /// Between 0 and 1.
    pub done: f32,
    pub stage: &'static str,
}

/// Called from loading threads; must be quick.
pub type OnProgress = Arc<dyn Fn(LoadProgress<'_>) + Send + Sync>;

/// Reads a model. It reports how far it is between 0 and 1; an error is a sentence for the operator.
pub type Loader =
    Box<dyn FnOnce(&dyn Fn(f32, &'static str)) -> Result<Loaded, String> + Send + 'static>;

/// Loads the models one after the other, in their order: loading is bound by the disk.
pub(crate) fn spawn(
    models: Vec<ModelOptions>,
    (registry, metrics, kv): (Arc<Registry>, Arc<Metrics>, Arc<KvPlane>),
    on_progress: Option<OnProgress>,
) {
    tokio::task::spawn_blocking(move || {
        let mut ready = Vec::new();
        for (index, model) in models.into_iter().enumerate() {
            let id = model.id;
            let report = |done: f32, stage| {
                registry.set(index, ModelState::Loading { done, stage });
                if let Some(on_progress) = &on_progress {
                    on_progress(LoadProgress { model: &id, done, stage });
                }
            };
            let began = Instant::now();
            let loaded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let loaded = (model.loader)(&|done, stage| report(done * READING, stage))?;
                report(READING, "warming up");
                start(&id, loaded, &metrics, &kv)
            }));
            let state = match loaded {
                Ok(Ok(model)) => {
                    let took_ms = began.elapsed().as_millis() as u64;
                    tracing::info!(model = %id, took_ms, "model is ready");
                    report(1.0, "ready");
                    let model = Arc::new(model);
                    ready.push(model.clone());
                    ModelState::Ready(model)
                }
                Ok(Err(why)) => {
                    tracing::error!(model = %id, error = %why, "model cannot be served");
                    ModelState::Failed(why)
                }
                Err(_) => {
                    tracing::error!(model = %id, "the loader panicked: please report this");
                    ModelState::Failed("its loader failed: see the log".to_owned())
                }
            };
            registry.set(index, state);
        }
        // Not before: the first clients wait for models, few of them for grammars.
        for model in ready {
            LazyLock::force(&model.grammars);
        }
    });
}

/// Warms the model up, then starts its thread.
fn start(id: &str, mut loaded: Loaded, metrics: &Metrics, kv: &KvPlane) -> Result<Model, String> {
    let origin = Instant::now();
    let clock = move || {
        protocol::Instant::from_nanos(
            u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX),
        )
    };
    warm_up(&mut *loaded.core, loaded.context_tokens_max, &clock)?;
    let metrics = metrics.model(id);
    let (replica, _thread) =
        ReplicaHandle::spawn(id, loaded.core, Arc::new(clock), metrics.clone())
            .map_err(|e| format!("cannot start its thread: {e}"))?;
    // A template that knows no tools can still be held to a call by a grammar; Hermes' form needs no
    // special tokens.
    let detect = |template| ToolFormat::detect(template, &loaded.tokenizer);
    let tool_format = loaded.template.as_ref().and_then(detect).unwrap_or(ToolFormat::Hermes);
    let kv = kv.add((id, &loaded.fingerprint), replica.clone(), loaded.namer);
    Ok(Model {
        id: id.to_owned(),
        kv,
        tool_format,
        grammars: grammars(id, &loaded.tokenizer),
        tokenizer: loaded.tokenizer,
        template: loaded.template,
        vocab: loaded.vocab,
        hidden: loaded.hidden,
        context_tokens_max: loaded.context_tokens_max,
        fingerprint: loaded.fingerprint,
        kv_bytes_per_token: loaded.kv_bytes_per_token,
        replica,
        metrics,
    })
}

fn grammars(id: &str, tokenizer: &Tokenizer) -> Grammars {
    let (id, tokenizer) = (id.to_owned(), tokenizer.clone());
    Grammars::new(Box::new(move || {
        TokenizerEnv::new(&tokenizer)
            .inspect_err(|error| tracing::warn!(model = id, %error, "no grammars for this model"))
            .ok()
            .map(GrammarCache::new)
    }))
}

/// Makes the first steps, so that the first client does not pay for cold pages, and so that routers know
/// from the first report on what this replica can do: one that has measured nothing is taken for a slow
/// one, and gets nothing that it could measure.
fn warm_up(
    core: &mut dyn Core,
    context_tokens_max: usize,
    clock: &dyn Fn() -> protocol::Instant,
) -> Result<(), String> {
    warm_step(core, 1, clock)?;
    // A prompt token takes no longer than a step of its own.
    let step_ns = core.stats().decode_step.as_nanos().max(1);
    let tokens = usize::try_from(MEASURE_TIME.as_nanos() / step_ns).unwrap_or(usize::MAX);
    let tokens = tokens.clamp(MEASURED_TOKENS_MIN, MEASURED_TOKENS_MAX);
    match tokens + WARM_TOKENS <= context_tokens_max {
        true => warm_step(core, tokens, clock),
        // Of so short a context no prompt takes long.
        false => Ok(()),
    }
}

/// Has a prompt of so many tokens computed, and a short answer.
fn warm_step(
    core: &mut dyn Core,
    prompt_tokens: usize,
    clock: &dyn Fn() -> protocol::Instant,
) -> Result<(), String> {
    let request = GenerateRequest {
        max_tokens: Some(WARM_TOKENS),
        ignore_eos: true,
        ..GenerateRequest::new(RequestId(u128::MAX), vec![0; prompt_tokens])
    };
    core.submit(clock(), Work::Generate(Box::new(request)))
        .map_err(|e| format!("its first step: {e}"))?;
    let mut events = Vec::new();
    for _ in 0..WARM_STEPS_MAX {
        core.step(clock, &mut events);
        for (_, event) in events.drain(..) {
            match event {
                engine::replica::Event::Finished { .. } => return Ok(()),
                engine::replica::Event::Failed { error, .. } => {
                    return Err(format!("its first step failed: {error}"));
                }
                _ => {}
            }
        }
    }
    Err("its first step did not end".to_owned())
}

/// Share of the progress that reading the files takes.
const READING: f32 = 0.95;
const WARM_TOKENS: usize = 2;
/// About how long a prompt is computed, to see how fast.
const MEASURE_TIME: Duration = Duration::from_millis(500);
/// Fewer tokens say little of a prompt.
const MEASURED_TOKENS_MIN: usize = 64;
const MEASURED_TOKENS_MAX: usize = 512;
const WARM_STEPS_MAX: usize = 64;
