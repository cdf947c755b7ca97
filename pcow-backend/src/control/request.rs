// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests and answers in QMP's form. Pure.

use serde_json::{Map, Value, json};

/// The class of an error, as QMP has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Everything but the next.
    GenericError,
    /// There is no such command, or not now.
    CommandNotFound,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    class: Class,
    description: String,
}

impl Refusal {
    /// A refusal that says `description`.
    pub fn new(description: impl Into<String>) -> Self {
        Self {
            class: Class::GenericError,
            description: description.into(),
        }
    }

    /// There is no such command, or not now.
    pub fn not_found(description: impl Into<String>) -> Self {
        Self {
            class: Class::CommandNotFound,
            description: description.into(),
        }
    }
}

/// A request, and the `id` that its answer carries.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command's name.
    pub command: String,
    /// Its arguments.
    pub arguments: Arguments,
    /// What the client knows it by.
    pub id: Option<Value>,
}

impl Request {
    /// Reads a message. With the refusal comes the `id`, if there is one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(message: &[u8]) -> Result<Self, (Refusal, Option<Value>)> {
        let object: Map<String, Value> = serde_json::from_slice(message)
            .map_err(|e| (Refusal::new(format!("JSON parse error: {e}")), None))?;
        let id = object.get("id").cloned();
        Self::from_object(object).map_err(|refusal| (refusal, id))
    }

    fn from_object(mut object: Map<String, Value>) -> Result<Self, Refusal> {
        let id = object.remove("id");
        let arguments = object.remove("arguments").unwrap_or_else(|| json!({}));
        let command = match object.remove("execute") {
            Some(Value::String(command)) => command,
            Some(_) => return Err(Refusal::new("'execute' must be a string")),
            None => return Err(Refusal::new("there is no member 'execute'")),
        };
        if let Some(name) = object.keys().next() {
            let what = format!("member '{}' is not expected", name.escape_debug());
            return Err(Refusal::new(what));
        }
        let Value::Object(arguments) = arguments else {
            return Err(Refusal::new("'arguments' must be an object"));
        };
        Ok(Self {
            command,
            arguments: Arguments(arguments),
            id,
        })
    }
}

/// The arguments of a command. Each is taken out once; what is left at the end nobody knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// Takes out the text called `name`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Refusal::new(format!("'{name}' must be a string"))),
        }
    }

    /// As [`Arguments::text`], for one that must be there.
    ///
    /// # Errors
    /// If it is something else, or missing.
    pub fn needed(&mut self, name: &str) -> Result<String, Refusal> {
        let missing = || Refusal::new(format!("argument '{name}' is missing"));
        self.text(name)?.ok_or_else(missing)
    }

    /// Takes out the list called `name`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn list(&mut self, name: &str) -> Result<Vec<Value>, Refusal> {
        match self.0.remove(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(_) => Err(Refusal::new(format!("'{name}' must be a list"))),
        }
    }

    /// Takes out the number called `name`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number(&mut self, name: &str) -> Result<Option<u64>, Refusal> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(value) => value
                .as_u64()
                .map(Some)
                .ok_or_else(|| Refusal::new(format!("'{name}' must be a number"))),
        }
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// Names what is.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(Refusal::new(format!(
                "argument '{}' is not expected",
                name.escape_debug()
            ))),
        }
    }
}

/// The answer to a request.
pub fn answer(result: Result<Value, Refusal>, id: Option<Value>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(refusal) => {
            json!({ "error": { "class": refusal.class.name(), "desc": refusal.description } })
        }
    };
    if let Some(id) = id {
        answer["id"] = id;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_command_and_perhaps_arguments_and_an_id() {
        let text = r#"{"execute": "x", "arguments": {"a": "b"}, "id": [1]}"#;
        let mut request = Request::parse(text.as_bytes()).unwrap();
        assert_eq!(
            (request.command.as_str(), request.id),
            ("x", Some(json!([1])))
        );
        assert_eq!(request.arguments.text("a").unwrap().as_deref(), Some("b"));
        assert_eq!(request.arguments.finish(), Ok(()));
        assert!(Request::parse(br#"{"execute": "x"}"#).unwrap().id.is_none());
    }

    #[test]
    fn what_is_wrong_is_said_with_the_id() {
        for (text, id) in [
            (r#"{"execute": 5, "id": 1}"#, Some(json!(1))),
            (
                r#"{"execute": "x", "arguments": [], "id": "a"}"#,
                Some(json!("a")),
            ),
            (r#"{"execute": "x", "more": 1}"#, None),
            (r#"{"arguments": {}}"#, None),
            (r#"{"execute" "x"}"#, None),
        ] {
            let (refusal, found) = Request::parse(text.as_bytes()).unwrap_err();
            assert_eq!((refusal.class, found), (Class::GenericError, id), "{text}");
        }
    }

    #[test]
    fn arguments_of_another_type_and_unknown_ones_are_refused() {
        let text = r#"{"execute": "x", "arguments": {"a": 1, "b": [], "c": "d"}}"#;
        let mut arguments = Request::parse(text.as_bytes()).unwrap().arguments;
        assert!(arguments.text("a").is_err() && arguments.number("b").is_err());
        assert!(arguments.finish().unwrap_err().description.contains("'c'"));
    }
}
