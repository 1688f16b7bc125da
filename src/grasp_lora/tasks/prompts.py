"""Question prompts, one template per language, and how a template becomes a prompt."""

from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.tasks.records import Example, Prompt

CONTEXT, QUESTION = "{context}", "{question}"
FALLBACK = "en"

PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "en": "Answer with words from the text.\nText: {context}\nQuestion: {question}\nAnswer:",
        "es": "Responde con palabras del texto.\n"
        "Texto: {context}\nPregunta: {question}\nRespuesta:",
        "de": "Antworte mit Wörtern aus dem Text.\nText: {context}\nFrage: {question}\nAntwort:",
        "fr": "Réponds avec des mots du texte.\n"
        "Texte : {context}\nQuestion : {question}\nRéponse :",
        "ar": "أجب بكلمات من النص.\nالنص: {context}\nالسؤال: {question}\nالجواب:",
        "zh": "用文中的词语回答。\n文章：{context}\n问题：{question}\n答案：",
        "hi": "पाठ के शब्दों में उत्तर दें।\nपाठ: {context}\nप्रश्न: {question}\nउत्तर:",
        "vi": "Trả lời bằng từ ngữ trong đoạn văn.\n"
        "Đoạn văn: {context}\nCâu hỏi: {question}\nTrả lời:",
        "tr": "Metindeki sözcüklerle yanıtla.\nMetin: {context}\nSoru: {question}\nYanıt:",
        "th": "ตอบด้วยคำจากข้อความ\nข้อความ: {context}\nคำถาม: {question}\nคำตอบ:",
        "ru": "Ответь словами из текста.\nТекст: {context}\nВопрос: {question}\nОтвет:",
        "sw": "Jibu kwa maneno kutoka kwenye maandishi.\n"
        "Maandishi: {context}\nSwali: {question}\nJibu:",
    }
)


def template_for(language: str) -> tuple[str, str | None]:
    """Return the question template of a language, and a notice where English stands in."""
    if language in PROMPTS:
        return PROMPTS[language], None
    known = ", ".join(PROMPTS)
    notice = (
        f"no built-in prompt for language {language!r} (there is one for {known}); "
        "the English prompt is used, set data.*.prompt to give your own"
    )
    return PROMPTS[FALLBACK], notice


def check_template(template: str) -> None:
    """Check that a template can be rendered.

    Raises:
        ValueError: unless {context} and {question} each occur exactly once.
    """
    for name in (CONTEXT, QUESTION):
        if template.count(name) != 1:
            raise ValueError(
                f"the prompt template holds {name} {template.count(name)} times, got {template!r}; "
                f"write {CONTEXT} and {QUESTION} exactly once each"
            )


def render_question(example: Example, template: str | None = None) -> Prompt:
    """Return the prompt of a question: its body is the context, all else is never shortened.

    Placeholders inside the context or the question are left as they are.

    Args:
        example: a row with the fields "context" and "question".
        template: text with {context} and {question}; None takes the language's own.

    Raises:
        ValueError: if the template lacks or repeats a placeholder.
    """
    chosen = template_for(example.language)[0] if template is None else template
    check_template(chosen)
    before, after = chosen.split(CONTEXT)
    question = example.fields["question"]
    return Prompt(
        prefix=before.replace(QUESTION, question),
        body=example.fields["context"],
        suffix=after.replace(QUESTION, question),
    )
