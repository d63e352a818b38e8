//! Why a choice ended.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why the model stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of text, or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The model calls tools.
    ToolCalls,
}
