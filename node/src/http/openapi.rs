//! The API's OpenAPI document, made from the handlers and types. A copy is checked in as
//! `docs/openapi.json`; a test fails when it is out of date.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use protocol::api::ErrorBody;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::{ObjectBuilder, Ref, RefOr, Required, ResponseBuilder, Type};
use utoipa::{OpenApi, ToSchema};

use super::forward::LAST_EVENT_ID;
use super::guard::TIMEOUT_HEADER;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Grapevine",
        description = "The OpenAI-compatible API of a Grapevine node. Unknown fields are ignored; known \
                       fields with wrong values are refused by name.",
        license(name = "Apache-2.0"),
    ),
    paths(
        super::chat::chat,
        super::completions::completions,
        super::embeddings::embeddings,
        super::system::models,
        super::system::model,
        super::system::endpoints,
        super::system::healthz,
        super::system::readyz,
        super::system::metrics,
        super::system::openapi,
    ),
    modifiers(&Security),
)]
struct Api;

/// How every endpoint that runs a model may refuse: by the statuses of the error codes.
pub(super) struct Refusals;

impl utoipa::IntoResponses for Refusals {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let body =
            || ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
        let refusal = |(status, description): (u16, &str)| {
            let response = ResponseBuilder::new().description(description);
            let response = response.content("application/json", body()).build();
            (status.to_string(), RefOr::T(response))
        };
        REFUSALS.into_iter().map(refusal).collect()
    }
}

/// The header by which a client bounds its request.
pub(super) struct TimeoutHeader;

impl utoipa::IntoParams for TimeoutHeader {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let schema = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).build();
        let description = "milliseconds that the request may take, at most what the node allows";
        let header = ParameterBuilder::new()
            .name(TIMEOUT_HEADER)
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(description))
            .schema(Some(schema));
        vec![header.build()]
    }
}

/// The header by which a client comes back to a stream.
pub(super) struct LastEventHeader;

impl utoipa::IntoParams for LastEventHeader {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let schema = ObjectBuilder::new().schema_type(Type::String).build();
        let description = "the id of the last event that came of a stream whose connection broke: the \
                           answer goes on with the next one";
        let header = ParameterBuilder::new()
            .name(LAST_EVENT_ID)
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(description))
            .schema(Some(schema));
        vec![header.build()]
    }
}

const REFUSALS: [(u16, &str); 6] = [
    (400, "a bad request"),
    (401, "no valid key"),
    (404, "no such model"),
    (429, "the queue is full"),
    (503, "loading, overloaded or shutting down"),
    (504, "the deadline of the request has passed"),
];

/// Keys are sent as bearer tokens.
struct Security;

impl utoipa::Modify for Security {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{
            Http, HttpAuthScheme, SecurityRequirement, SecurityScheme,
        };
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("key", scheme);
        let none: [&str; 0] = [];
        // An empty requirement beside it: a node on loopback asks for no key.
        api.security =
            Some(vec![SecurityRequirement::new("key", none), SecurityRequirement::default()]);
    }
}

/// The document, indented, with a newline at its end.
pub fn document() -> &'static str {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let mut text = Api::openapi().to_pretty_json().unwrap_or_default();
        text.push('\n');
        text
    })
}
