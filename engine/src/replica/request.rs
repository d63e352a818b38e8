//! What may be asked of a replica, and what it answers with.

use crate::grammar::Grammar;
use crate::sampler::{ParamError, SampledToken, SamplingParams};
use protocol::{Duration, Instant, RequestId, TenantId, TokenId};
use thiserror::Error;

/// Text generation: `choices` sequences that share one prompt.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub request: RequestId,
    pub tenant: TenantId,
    pub prompt: Vec<TokenId>,
    /// OpenAI's `n`: independent continuations, at least 1.
    pub choices: usize,
    pub sampling: SamplingParams,
    /// The client's seed; without one the request's id keys the draws.
    pub seed: Option<i64>,
    /// Most tokens to generate for each choice; `None` runs to the end of the context.
    pub max_tokens: Option<usize>,
    /// Generation ends before the first of these, also when it spans tokens.
    pub stop: Vec<String>,
    /// Compiled beforehand, away from the thread that steps.
    pub grammar: Option<Grammar>,
    /// Special tokens that belong to the text here (markers of tool calls).
    pub visible_specials: Vec<TokenId>,
    /// Go on past end-of-generation tokens: benchmarks only.
    pub ignore_eos: bool,
    /// Higher goes first.
    pub priority: i8,
    pub deadline: Option<Instant>,
    /// What was generated before, on another replica: one entry for each choice, or none at all.
    pub resume: Vec<Resumed>,
}

/// A choice of which some was generated before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resumed {
    /// Its tokens so far, as they were drawn.
    pub tokens: Vec<SampledToken>,
    /// Why it ended, if it has.
    pub finished: Option<FinishReason>,
}

impl GenerateRequest {
    /// A greedy request of the local tenant without limits: what tests and the CLI start from.
    pub fn new(request: RequestId, prompt: Vec<TokenId>) -> Self {
        GenerateRequest {
            request,
            tenant: TenantId::local(),
            prompt,
            choices: 1,
            sampling: SamplingParams::default(),
            seed: None,
            max_tokens: None,
            stop: Vec::new(),
            grammar: None,
            visible_specials: Vec::new(),
            ignore_eos: false,
            priority: PRIORITY_DEFAULT,
            deadline: None,
            resume: Vec::new(),
        }
    }
}

/// One vector for one text.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    pub request: RequestId,
    pub tenant: TenantId,
    pub tokens: Vec<TokenId>,
    pub pooling: Pooling,
    pub priority: i8,
    pub deadline: Option<Instant>,
}

/// Log-probabilities of a given text: `echo` with `logprobs`, perplexity.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    pub request: RequestId,
    pub tenant: TenantId,
    pub tokens: Vec<TokenId>,
    /// Alternatives to report for each token.
    pub top: usize,
    pub priority: i8,
    pub deadline: Option<Instant>,
}

/// How hidden states `[tokens, hidden]` become one vector, before L2 normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Average over tokens.
    Mean,
    /// The last token's state.
    Last,
}

/// What happened to a request. `choice` counts from 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The sequence left the queue; `cached_tokens` of its prompt need no computing.
    Started { choice: usize, cached_tokens: usize },
    /// The token at `index` of a choice. `text` may be empty: bytes of an unfinished code point or of
    /// a possible stop string are held back until decided.
    Token { choice: usize, index: u64, sampled: SampledToken, text: String },
    /// The last event of a choice that ran. `text` is what was still held back.
    Finished { choice: usize, reason: FinishReason, text: String, generated: usize },
    /// The vector `[hidden]`, L2-normalised.
    Embedding { vector: Vec<f32> },
    /// Entry `i` is about token `i` given those before it; the first token has none.
    Scores { tokens: Vec<Option<SampledToken>> },
    /// The last event of a choice (or of the whole request) that could not go on.
    Failed { choice: usize, error: RequestError },
}

/// Why a choice ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-generation token, stop string, or the grammar is complete.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
}

/// Why a request was refused or broke off. Its blocks are free again in every case.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum RequestError {
    #[error(transparent)]
    Param(#[from] ParamError),
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    #[error("token {token} at position {position} is not in the vocabulary of {vocab} tokens")]
    UnknownToken { token: TokenId, position: usize, vocab: usize },
    #[error(
        "the prompt has {tokens} tokens, but this model's context holds {limit} \
         (prompt and answer together): shorten the prompt"
    )]
    TooLong { tokens: usize, limit: usize },
    #[error("{0}")]
    Grammar(String),
    #[error("the queue is full: try again in {} s", retry_after.as_secs().max(1))]
    QueueFull { retry_after: Duration },
    #[error("the deadline passed before the answer was complete")]
    DeadlineExceeded,
    #[error("cancelled")]
    Cancelled,
    #[error("the request was asked for once more, and its first answer ends here")]
    TakenOver,
    #[error("max_tokens is 0: there is nothing to generate")]
    NothingToGenerate,
    #[error("{0} choices were asked for; at most {CHOICES_MAX} are served at once")]
    TooManyChoices(usize),
    #[error(
        "{0} stop strings were given; at most {STOP_STRINGS_MAX} of 1 to {STOP_BYTES_MAX} bytes are"
    )]
    BadStop(usize),
    #[error("what was generated before does not belong to this request: {0}")]
    BadResume(String),
    #[error("the model computed no usable logits for token {index}: its weights may be damaged")]
    NoToken { index: u64 },
    #[error("the step failed: {0}")]
    Step(String),
}

/// Priority of requests that name none.
pub const PRIORITY_DEFAULT: i8 = 0;
/// Most choices of one request.
pub const CHOICES_MAX: usize = 128;
/// Most stop strings of one request.
pub const STOP_STRINGS_MAX: usize = 16;
/// Longest stop string.
pub const STOP_BYTES_MAX: usize = 1024;
