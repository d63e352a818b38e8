//! The models of a node and how far each is.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::api::{ApiError, ErrorCode, ModelInfo, ModelList};
use protocol::node_record::{ReplicaRecord, ReplicaState};
use serde::Serialize;
use tokio::sync::watch;

use crate::model::Model;

/// How far a model is.
#[derive(Clone)]
pub enum ModelState {
    /// Being read; `done` is between 0 and 1.
    Loading {
        done: f32,
        stage: &'static str,
    },
    Ready(Arc<Model>),
    /// It cannot be served; the sentence says why.
    Failed(String),
}

/// Models by name, in the order of the command line. Which models there are never changes.
pub(crate) struct Registry {
    entries: Vec<Entry>,
    /// Counts changes of states.
    changes: watch::Sender<u64>,
}

struct Entry {
    id: String,
    created: u64,
    state: RwLock<ModelState>,
}

/// A model's place in `/readyz`.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct ModelReadiness {
    pub id: String,
    /// `loading`, `ready` or `failed`.
    pub state: &'static str,
    /// What the loader is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<&'static str>,
    /// Between 0 and 1.
    pub progress: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Registry {
    pub fn new(ids: impl IntoIterator<Item = String>) -> Registry {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let loading = || RwLock::new(ModelState::Loading { done: 0.0, stage: "waiting" });
        let entries = ids.into_iter().map(|id| Entry { id, created, state: loading() }).collect();
        Registry { entries, changes: watch::Sender::new(0) }
    }

    /// Notes how far the model at `index` is.
    pub fn set(&self, index: usize, state: ModelState) {
        *self.entries[index].state.write().unwrap_or_else(PoisonError::into_inner) = state;
        self.changes.send_modify(|n| *n += 1);
    }

    /// The model of that name, if it can serve now.
    pub fn ready(&self, id: &str) -> Result<Arc<Model>, ApiError> {
        let Some(entry) = self.entries.iter().find(|e| e.id == id) else {
            return Err(self.not_found(id));
        };
        match entry.state() {
            ModelState::Ready(model) if model.is_running() => Ok(model),
            ModelState::Ready(_) => Err(ApiError::new(
                ErrorCode::ModelUnavailable,
                format!("the replica of model {id} has stopped: restart the node"),
            )),
            ModelState::Loading { done, .. } => Err(ApiError::new(
                ErrorCode::ModelLoading,
                format!("model {id} is being loaded ({:.0} %): try again soon", done * 100.0),
            )
            .retry_after_s(LOADING_RETRY_S)),
            ModelState::Failed(why) => Err(ApiError::new(
                ErrorCode::ModelUnavailable,
                format!("model {id} could not be loaded: {why}"),
            )
            .retry_after_s(FAILED_RETRY_S)),
        }
    }

    pub fn not_found(&self, id: &str) -> ApiError {
        let known: Vec<&str> = self.entries.iter().map(|e| e.id.as_str()).collect();
        let asked: String = id.chars().take(ID_CHARS_MAX).collect();
        let message = format!("model {asked:?} is not served here; there is: {}", known.join(", "));
        ApiError::new(ErrorCode::ModelNotFound, message).at("model")
    }

    pub fn list(&self) -> ModelList {
        ModelList {
            object: "list".to_owned(),
            data: self.entries.iter().map(Entry::info).collect(),
        }
    }

    pub fn info(&self, id: &str) -> Option<ModelInfo> {
        self.entries.iter().find(|e| e.id == id).map(Entry::info)
    }

    pub fn readiness(&self) -> Vec<ModelReadiness> {
        self.entries.iter().map(Entry::readiness).collect()
    }

    /// The models as this node tells others of them.
    pub fn replica_records(&self) -> Vec<ReplicaRecord> {
        self.entries.iter().map(Entry::replica_record).collect()
    }

    /// Waits until no model is loading; the sentences of those that failed.
    pub async fn loaded(&self) -> Vec<(String, String)> {
        let mut changes = self.changes.subscribe();
        let loading =
            || self.entries.iter().any(|e| matches!(e.state(), ModelState::Loading { .. }));
        while loading() {
            if changes.changed().await.is_err() {
                break;
            }
        }
        let failed = |e: &Entry| match e.state() {
            ModelState::Failed(why) => Some((e.id.clone(), why)),
            _ => None,
        };
        self.entries.iter().filter_map(failed).collect()
    }
}

impl Entry {
    fn state(&self) -> ModelState {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn info(&self) -> ModelInfo {
        let context_tokens_max = match self.state() {
            ModelState::Ready(model) => Some(model.context_tokens_max as u64),
            _ => None,
        };
        ModelInfo {
            id: self.id.clone(),
            object: "model".to_owned(),
            created: self.created,
            owned_by: "grapevine".to_owned(),
            context_tokens_max,
        }
    }

    fn replica_record(&self) -> ReplicaRecord {
        let record = ReplicaRecord {
            model: self.id.clone(),
            created_s: self.created,
            ..ReplicaRecord::default()
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        match self.state() {
            ModelState::Loading { .. } => record,
            ModelState::Ready(model) if model.is_running() => {
                let stats = model.replica.stats();
                ReplicaRecord {
                    fingerprint: model.fingerprint.clone(),
                    state: ReplicaState::Ready,
                    context_tokens_max: count(model.context_tokens_max),
                    running: count(stats.running),
                    waiting: count(stats.waiting),
                    prompt_tokens: stats.prompt_tokens_left,
                    prefill_rate: stats.prompt_rate,
                    decode_step_us: u32::try_from(stats.decode_step.as_micros())
                        .unwrap_or(u32::MAX),
                    kv_blocks_free: count(stats.blocks_free + stats.blocks_cached),
                    kv_blocks: count(stats.blocks_free + stats.blocks_cached + stats.blocks_used),
                    kv_bytes_per_token: count(model.kv_bytes_per_token),
                    below_ns_per_token: stats.tiers.map(|_| {
                        let block_tokens = model.replica.kv_format().map_or(1, |f| f.block_tokens);
                        let ns =
                            stats.block_time_below.as_nanos() / u128::from(block_tokens.max(1));
                        u32::try_from(ns).unwrap_or(u32::MAX)
                    }),
                    ..record
                }
            }
            ModelState::Ready(_) | ModelState::Failed(_) => {
                ReplicaRecord { state: ReplicaState::Failed, ..record }
            }
        }
    }

    fn readiness(&self) -> ModelReadiness {
        let (state, stage, progress, error) = match self.state() {
            ModelState::Loading { done, stage } => ("loading", Some(stage), done, None),
            ModelState::Ready(model) if model.is_running() => ("ready", None, 1.0, None),
            ModelState::Ready(_) => ("failed", None, 1.0, Some("the replica has stopped".into())),
            ModelState::Failed(why) => ("failed", None, 0.0, Some(why)),
        };
        ModelReadiness { id: self.id.clone(), state, stage, progress, error }
    }
}

const LOADING_RETRY_S: u32 = 2;
const FAILED_RETRY_S: u32 = 60;
/// Longest unknown name that is quoted.
const ID_CHARS_MAX: usize = 100;
