//! `GET /openapi.json`: the description of the API, made from the handlers and the wire types themselves.

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{OpenApi as Document, SecurityRequirement};
use utoipa::{Modify, OpenApi};

use super::wire::ActionSchema;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Greenroom",
        description = "Tell the Greenroom sidecar what your agents are doing, and their KV cache is back on the GPU before their next request. \
            Errors have the shape `{\"error\":{\"code\",\"message\"}}`; 429 and 503 carry `Retry-After`. The token is needed only where \
            the sidecar was started with `--token-file`."
    ),
    paths(
        super::health,
        super::metrics,
        super::describe,
        super::status,
        super::sessions,
        super::session,
        super::retire,
        super::tool_start,
        super::tool_progress,
        super::tool_end,
        super::break_pins,
        super::hints,
        super::compat_prefetch,
        super::compat_pin,
    ),
    components(schemas(ActionSchema)),
    modifiers(&Bearer)
)]
struct Api;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut Document) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        if let Some(components) = document.components.as_mut() {
            components.add_security_scheme("token", SecurityScheme::Http(scheme));
        }
        let token = SecurityRequirement::new::<_, [String; 0], String>("token", []);
        document.security = Some(vec![SecurityRequirement::default(), token]);
    }
}

/// The whole description.
pub fn document() -> Document {
    Api::openapi()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let document = serde_json::to_value(document()).unwrap();
        let mut described: Vec<(String, String)> = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                described.push((method.clone(), path.clone()));
            }
        }
        let mut routes: Vec<(String, String)> = super::super::ROUTES
            .iter()
            .map(|(method, path)| ((*method).to_owned(), (*path).to_owned()))
            .collect();
        described.sort();
        routes.sort();
        assert_eq!(described, routes);
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_call_has_a_sentence() {
        let document = serde_json::to_value(document()).unwrap();
        let text = document.to_string();
        let schemas = &document["components"]["schemas"];
        let mut references = 0;
        for (start, _) in text.match_indices("#/components/schemas/") {
            let name = text[start..].trim_start_matches("#/components/schemas/");
            let name = &name[..name.find('"').unwrap()];
            assert!(schemas[name].is_object(), "{name} is not described");
            references += 1;
        }
        assert!(references > 20, "only {references} references");
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, call) in item.as_object().unwrap() {
                assert!(
                    call["summary"].is_string() || call["description"].is_string(),
                    "{method} {path}"
                );
                let takes_body = method == "post";
                assert_eq!(
                    call["requestBody"].is_object(),
                    takes_body,
                    "{method} {path}"
                );
            }
        }
    }
}
