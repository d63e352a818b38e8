//! Who has the beginning of a request's prompt cached, for the router: only where this node has the model, and so its
//! tokenizer.

use std::sync::Arc;

use protocol::api::{ChatRequest, CompletionRequest};
use protocol::forward::Endpoint;

use super::guard::Caller;
use super::{App, chat, embeddings};
use crate::kv::Overlaps;

/// What of the prompt's beginning each node is said to have. Nothing for short requests, which cost
/// less than to look; nothing wrong is said of a request that is none: its handler will.
pub(super) async fn overlap(
    app: &App,
    caller: &Caller,
    endpoint: Endpoint,
    model: &str,
    body: &[u8],
) -> Overlaps {
    let found = async {
        if body.len() < BODY_BYTES_MIN {
            return None;
        }
        let model = app.registry.ready(model).ok()?;
        let kv = model.kv.clone()?;
        let prompt = match endpoint {
            Endpoint::Chat => {
                let request: ChatRequest = serde_json::from_slice(body).ok()?;
                chat::prompt(model, Arc::new(request), caller.created).await.ok()?
            }
            Endpoint::Completions => {
                let request: CompletionRequest = serde_json::from_slice(body).ok()?;
                let prompts = embeddings::tokenize(model, request.prompt, "prompt").await.ok()?;
                prompts.into_iter().next()?
            }
            Endpoint::Embeddings => return None,
        };
        Some(kv.overlap(&caller.tenant, &prompt).await)
    };
    found.await.unwrap_or_default()
}

/// Some hundred tokens.
const BODY_BYTES_MIN: usize = 1024;
