//! The CLI's client of an OpenAI-compatible server over plain HTTP.

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use std::time::Duration;

/// Cheap to clone; keeps connections alive.
#[derive(Clone)]
pub struct Client {
    http: HyperClient<HttpConnector, Full<Bytes>>,
    base: String,
    key: Option<String>,
}

/// Events of a stream, one JSON object each.
pub struct EventStream {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Client {
    /// `endpoint` is a base URL, with or without a trailing `/v1`.
    pub fn new(endpoint: &str, key: Option<String>) -> anyhow::Result<Self> {
        let base = endpoint.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if !base.starts_with("http://") {
            bail!(
                "{endpoint:?} is not a URL that starts with http://; put a TLS proxy in front for https"
            );
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let http = HyperClient::builder(TokioExecutor::new()).build(connector);
        Ok(Client { http, base, key })
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    pub async fn json(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, None).await
    }

    pub async fn text(&self, path: &str) -> anyhow::Result<String> {
        let response = self.send(Method::GET, path, None).await?;
        let body = response.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Sends JSON and reads JSON.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let response = self.send(method, path, body).await?;
        let body = response.into_body().collect().await?.to_bytes();
        serde_json::from_slice(&body).with_context(|| format!("{}{path} is not JSON", self.base))
    }

    /// Names of the models that the server lists.
    pub async fn models(&self) -> anyhow::Result<Vec<String>> {
        let list = self.json("/v1/models").await?;
        let models = list["data"].as_array().context("/v1/models has no list `data`")?;
        Ok(models.iter().filter_map(|m| m["id"].as_str().map(str::to_owned)).collect())
    }

    /// `wanted`, or the first model that the server lists.
    pub async fn model(&self, wanted: Option<&str>) -> anyhow::Result<String> {
        if let Some(name) = wanted {
            return Ok(name.to_owned());
        }
        let models = self.models().await?;
        models.into_iter().next().with_context(|| format!("{} serves no model", self.base))
    }

    /// Starts a stream of server-sent events.
    pub async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<EventStream> {
        let response = self.send(Method::POST, path, Some(body)).await?;
        Ok(EventStream { body: response.into_body(), buffer: Vec::new() })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let url = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method).uri(&url);
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(bytes)))?;
        let response = self.http.request(request).await.with_context(|| {
            format!("no answer from {url}: is a node running there? (`vine up`)")
        })?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let message = serde_json::from_slice::<Value>(&body)
            .ok()
            .and_then(|v| v["error"]["message"].as_str().map(str::to_owned))
            .unwrap_or_else(|| String::from_utf8_lossy(&body).chars().take(300).collect());
        bail!("{url} answered {status}: {message}")
    }
}

impl EventStream {
    /// The next event; `None` after `[DONE]` or the end of the body.
    pub async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            if let Some(event) = self.take_event() {
                if event == "[DONE]" {
                    return Ok(None);
                }
                let value: Value = serde_json::from_str(&event).context("an event is not JSON")?;
                if let Some(message) = value["error"]["message"].as_str() {
                    bail!("the stream broke off: {message}");
                }
                return Ok(Some(value));
            }
            if self.buffer.len() > EVENT_BYTES_MAX {
                bail!("an event of more than {EVENT_BYTES_MAX} bytes");
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.context("the stream broke off")?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// Cuts one event off the buffer and gives its data.
    fn take_event(&mut self) -> Option<String> {
        loop {
            let end = self.buffer.windows(2).position(|w| w == b"\n\n")?;
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&event);
            let data: Vec<&str> = text
                .lines()
                .filter_map(|line| line.strip_prefix("data:"))
                .map(|data| data.strip_prefix(' ').unwrap_or(data))
                .collect();
            // Comments keep the connection alive and carry nothing.
            if !data.is_empty() {
                return Some(data.join("\n"));
            }
        }
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest event that is waited for.
const EVENT_BYTES_MAX: usize = 16 << 20;
