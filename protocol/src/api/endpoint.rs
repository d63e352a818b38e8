//! Where the API is.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One node that answers the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndpointInfo {
    /// Always `endpoint`.
    pub object: String,
    /// The node's id; absent where the node is in no mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// For people: its host's name.
    pub name: String,
    /// Base URLs that lead to this one node, the likeliest first: `http://192.0.2.1:8420/v1`.
    pub urls: Vec<String>,
}

/// The answer of `GET /v1/endpoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndpointList {
    /// Always `list`.
    pub object: String,
    /// The id of the node that answers; absent where it is in no mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The node that answers comes first, unless it drains.
    pub data: Vec<EndpointInfo>,
}
