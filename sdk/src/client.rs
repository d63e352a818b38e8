//! The client: what its calls share.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Method;
use hyper::header::{HeaderValue, InvalidHeaderValue};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use protocol::api::{
    ChatChunk, ChatCompletion, Completion, EmbeddingList, EndpointList, Input, ModelList,
};
use serde::de::DeserializeOwned;

use crate::attempt::{Attempts, Call};
use crate::base::Base;
use crate::endpoints::{Endpoints, Fault};
use crate::{Chat, ClientOptions, Error, EventStream, Request};

/// A client of one mesh. Cheap to clone; clones share connections and what is known of endpoints. Calls
/// need a Tokio runtime with time and IO.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: HyperClient<HttpConnector, Full<Bytes>>,
    authorization: Option<HeaderValue>,
    options: ClientOptions,
    state: Mutex<State>,
    random: RandomState,
}

struct State {
    endpoints: Endpoints,
    refreshed: Option<Instant>,
    /// Somebody is asking.
    refreshing: bool,
    /// An endpoint failed since: ask earlier.
    stale: bool,
    draws: u64,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints()).finish_non_exhaustive()
    }
}

impl Client {
    /// A client that asks these endpoints, base URLs such as `http://127.0.0.1:8420` (a `/v1` at the end
    /// may stand), and those that their nodes tell it. The first one is asked as long as it answers.
    ///
    /// The key goes, in the clear, to all of them. Nodes speak plain HTTP only: on a network that is not
    /// trusted, put a TLS proxy on both ends and turn `refresh_after` off.
    ///
    /// # Errors
    /// If there is no endpoint, one is no such URL, or the key is no text for a header.
    pub fn new<S: AsRef<str>>(
        endpoints: impl IntoIterator<Item = S>,
        key: Option<&str>,
    ) -> Result<Client, Error> {
        Client::with_options(endpoints, key, ClientOptions::default())
    }

    /// As [`new`](Self::new), with other bounds.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_options<S: AsRef<str>>(
        endpoints: impl IntoIterator<Item = S>,
        key: Option<&str>,
        options: ClientOptions,
    ) -> Result<Client, Error> {
        let given: Vec<Base> =
            endpoints.into_iter().map(|url| Base::parse(url.as_ref())).collect::<Result<_, _>>()?;
        if given.is_empty() {
            return Err(Error::NoEndpoint);
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(options.connect_timeout));
        let http = HyperClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        let state = State {
            endpoints: Endpoints::new(given),
            refreshed: None,
            refreshing: false,
            stale: false,
            draws: 0,
        };
        let inner = Inner {
            http,
            authorization: key.map(bearer).transpose().map_err(|_| Error::Key)?,
            options,
            state: Mutex::new(state),
            random: RandomState::new(),
        };
        Ok(Client { inner: Arc::new(inner) })
    }

    /// The whole answer of a chat. It is streamed from the node, so it survives what streams survive.
    ///
    /// # Errors
    /// When nobody answers, the request is refused, or the answer breaks off for good.
    pub async fn chat(&self, request: &Request<Chat>) -> Result<ChatCompletion, Error> {
        self.chat_stream(request).collect().await
    }

    /// A chat, piece by piece. Nothing is sent before the stream is read; dropping it ends the request.
    pub fn chat_stream(&self, request: &Request<Chat>) -> EventStream<ChatChunk> {
        EventStream::new(self.clone(), request.body())
    }

    /// The whole continuation of a text. It is streamed from the node, which does not stream an echo of
    /// nothing but the prompt (`max_tokens` 0) and refuses it.
    ///
    /// # Errors
    /// As [`chat`](Self::chat).
    pub async fn complete(
        &self,
        request: &Request<crate::Completion>,
    ) -> Result<Completion, Error> {
        self.complete_stream(request).collect().await
    }

    /// A text that goes on, piece by piece; see [`chat_stream`](Self::chat_stream).
    pub fn complete_stream(&self, request: &Request<crate::Completion>) -> EventStream<Completion> {
        EventStream::new(self.clone(), request.body())
    }

    /// Vectors of texts. Asked again elsewhere when its node fails.
    ///
    /// # Errors
    /// When nobody answers, or the request is refused.
    pub async fn embed(&self, model: &str, input: Input) -> Result<EmbeddingList, Error> {
        let body = serde_json::json!({"model": model, "input": input}).to_string();
        self.whole(self.call(Method::POST, "/v1/embeddings", body.into_bytes())).await
    }

    /// The models of the mesh.
    ///
    /// # Errors
    /// When nobody answers, or the key is refused.
    pub async fn models(&self) -> Result<ModelList, Error> {
        self.whole(self.call(Method::GET, "/v1/models", Vec::new())).await
    }

    /// Base URLs, without `/v1`, of the endpoints that are known, in the order in which they are asked.
    pub fn endpoints(&self) -> Vec<String> {
        let bases = self.state().endpoints.bases(Instant::now());
        bases.iter().map(|base| base.as_str().to_owned()).collect()
    }

    /// Asks a node now where else the API is. Calls do this by themselves, beside their own work.
    ///
    /// # Errors
    /// If nobody answers, or the key is refused.
    pub async fn refresh(&self) -> Result<(), Error> {
        self.refresh_within(self.inner.options.attempts_max).await
    }

    async fn refresh_within(&self, attempts_max: u32) -> Result<(), Error> {
        let mut call = self.call(Method::GET, "/v1/endpoints", Vec::new());
        call.deadline = call.deadline.min(Instant::now() + REFRESH_MAX);
        call.attempts_max = attempts_max;
        let mut attempts = Attempts::default();
        let (base, list) = self.read_whole::<EndpointList>(&call, &mut attempts).await?;
        let mut state = self.state();
        state.endpoints.tell(&base, list);
        (state.refreshed, state.stale) = (Some(Instant::now()), false);
        Ok(())
    }

    /// Starts to ask where else the API is, if that was long ago.
    pub(crate) fn refresh_if_due(&self) {
        let Some(after) = self.inner.options.refresh_after else { return };
        let now = Instant::now();
        let mut state = self.state();
        let after = if state.stale { after.min(REFRESH_STALE) } else { after };
        if state.refreshing || state.refreshed.is_some_and(|at| now < at + after) {
            return;
        }
        (state.refreshing, state.refreshed) = (true, Some(now));
        drop(state);
        let client = self.clone();
        tokio::spawn(async move {
            // A mesh that does not say is asked again later; calls go on with what is known.
            let _ = client.refresh_within(1).await;
            client.state().refreshing = false;
        });
    }

    async fn whole<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        self.refresh_if_due();
        let (_, whole) = self.read_whole(&call, &mut Attempts::default()).await?;
        Ok(whole)
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.inner.options
    }

    pub(crate) fn http(&self) -> &HyperClient<HttpConnector, Full<Bytes>> {
        &self.inner.http
    }

    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        self.inner.authorization.as_ref()
    }

    pub(crate) fn call(&self, method: Method, path: &'static str, body: Vec<u8>) -> Call {
        let ClientOptions { deadline, attempts_max, .. } = self.inner.options;
        let deadline = Instant::now() + deadline;
        Call { method, path, body: body.into(), deadline, attempts_max, last_event: None }
    }

    /// Whom to ask next, and when.
    pub(crate) fn choose(&self, excluded: &[Base]) -> Option<(Base, Option<Instant>)> {
        self.state().endpoints.choose(Instant::now(), excluded)
    }

    pub(crate) fn worked(&self, base: &Base) {
        self.state().endpoints.worked(base);
    }

    pub(crate) fn failed(&self, base: &Base, fault: Fault) {
        let mut state = self.state();
        state.draws += 1;
        let random = self.inner.random.hash_one(state.draws);
        state.endpoints.failed(base, Instant::now(), fault, random);
        state.stale = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bearer(key: &str) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {key}"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Less than the 75 s after which nodes close idle connections.
const IDLE_MAX: Duration = Duration::from_secs(30);
const IDLE_CONNECTIONS_MAX: usize = 8;
/// Time that a question for endpoints may take, with all its attempts.
const REFRESH_MAX: Duration = Duration::from_secs(5);
/// The least time between two such questions when endpoints fail.
const REFRESH_STALE: Duration = Duration::from_secs(1);
