//! The API's OpenAPI document, made from the handlers and types. A copy is checked in as
//! `docs/openapi.json`; a test fails when it is out of date.

use std::sync::OnceLock;

use utoipa::OpenApi;

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
        super::system::healthz,
        super::system::readyz,
        super::system::metrics,
        super::system::openapi,
    ),
    modifiers(&Security),
)]
struct Api;

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
