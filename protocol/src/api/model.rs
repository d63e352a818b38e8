//! The list of models.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One model that this node serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelInfo {
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Seconds since the Unix epoch at which the node took the model on.
    pub created: u64,
    pub owned_by: String,
    /// Longest prompt and answer together, in tokens. Absent while the model is loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens_max: Option<u64>,
}

/// The answer of `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    pub data: Vec<ModelInfo>,
}
