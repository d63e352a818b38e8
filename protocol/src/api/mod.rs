//! The OpenAI-compatible API as types: requests, answers, stream chunks and the one [`ErrorCode`].
//!
//! Shared by the node and the SDK. Owns the shape of the JSON and what can be checked without a
//! model (`validate`). Refuses: HTTP, defaults that depend on a model, and internal state.
//!
//! A field that is `null` counts as absent; a field that is unknown here is ignored; a field that is
//! known and wrong is refused by name.

mod chat;
mod choice;
mod completion;
mod embedding;
mod endpoint;
mod error;
mod explain;
mod input;
mod message;
mod model;
mod sampling;
mod tool;
mod usage;

pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatMessageOut,
    ChatRequest, Delta, TokenLogprob, TopLogprob,
};
pub use choice::FinishReason;
pub use completion::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest};
pub use embedding::{
    Embedding, EmbeddingData, EmbeddingList, EmbeddingRequest, EmbeddingUsage, EncodingFormat,
};
pub use endpoint::{EndpointInfo, EndpointList};
pub use error::{ApiError, ErrorBody, ErrorCode, ErrorDetail};
pub use explain::{
    ExplainedCandidate, ExplainedChoice, ExplainedDecision, ExplainedNode, ExplainedOption,
    ExplainedOutcome, ExplainedPrefill, ExplainedReplica, ExplainedSource, ExplainedUnavailable,
    Explanation,
};
pub use input::{Input, Stop};
pub use message::{Content, ContentPart, Message, Role};
pub use model::{ModelInfo, ModelList};
pub use sampling::{
    Grammar, GrammarSyntax, JsonSchemaFormat, ResponseFormat, ResponseFormatType, StreamOptions,
};
pub use tool::{
    CalledFunction, Function, FunctionDelta, FunctionName, NamedFunction, Tool, ToolCall,
    ToolCallDelta, ToolChoice, ToolChoiceMode, ToolType,
};
pub use usage::{CompletionTokensDetails, PromptTokensDetails, Usage};

/// Most choices that one request may ask for.
pub const CHOICES_MAX: u32 = 128;
/// Most stop strings in one request. OpenAI takes 4; agents use more.
pub const STOP_STRINGS_MAX: usize = 16;
/// Longest stop string, in bytes: each one is matched against the tail of every stream.
pub const STOP_STRING_BYTES_MAX: usize = 1024;
/// Most alternatives reported for a token.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Most tools in one request.
pub const TOOLS_MAX: usize = 128;
/// Most messages in one chat.
pub const MESSAGES_MAX: usize = 4096;
/// Most prompts or inputs in one request to `/v1/completions` or `/v1/embeddings`.
pub const INPUTS_MAX: usize = 2048;
