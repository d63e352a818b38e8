//! A model that can serve: its tokenizer, its template and the way to its replica.

use std::sync::{Arc, LazyLock};

use engine::chat::{ChatTemplate, ToolFormat};
use engine::grammar::GrammarCache;
use engine::tokenizer::Tokenizer;
use protocol::TokenId;

use crate::kv::ModelKv;
use crate::metrics::ModelMetrics;
use crate::replica::ReplicaHandle;

/// Made at its first use, or when all models are loaded: it takes a walk through the whole vocabulary,
/// a third of a second for 150,000 tokens. `None` for a vocabulary in which no text can end.
pub type Grammars =
    LazyLock<Option<GrammarCache>, Box<dyn FnOnce() -> Option<GrammarCache> + Send>>;

/// What handlers need of a loaded model.
pub struct Model {
    /// The name that clients ask for.
    pub id: String,
    pub tokenizer: Tokenizer,
    /// `None` for models that have none: they serve no chat.
    pub template: Option<ChatTemplate>,
    /// How the model writes calls of tools.
    pub tool_format: ToolFormat,
    /// Compiles grammars and keeps them.
    pub grammars: Grammars,
    /// Width of the logits.
    pub vocab: usize,
    /// Width of an embedding.
    pub hidden: usize,
    /// Prompt and answer together.
    pub context_tokens_max: usize,
    /// Names weights and numerics.
    pub fingerprint: String,
    /// Bytes of keys and values that one token takes.
    pub kv_bytes_per_token: usize,
    /// Its KV blocks from and to other nodes, if it exchanges any.
    pub(crate) kv: Option<Arc<ModelKv>>,
    pub replica: ReplicaHandle,
    pub metrics: ModelMetrics,
}

impl Model {
    /// False once the replica's thread has ended.
    pub fn is_running(&self) -> bool {
        self.replica.is_running()
    }

    /// A token by itself; bytes that are not UTF-8 become U+FFFD.
    pub fn token_text(&self, token: TokenId) -> String {
        String::from_utf8_lossy(self.tokenizer.token_bytes(token)).into_owned()
    }
}
