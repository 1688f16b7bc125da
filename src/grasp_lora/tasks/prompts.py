"""Prompt templates of the tasks, one per language, and their rendering."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.base.words import shown
from grasp_lora.tasks.records import Example, Prompt, Task, in_language

FALLBACK = "en"
_NAME = re.compile(r"\{([^\W\d]\w*)\}")

QA_PROMPTS: Mapping[str, str] = MappingProxyType(
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
        "el": "Απάντησε με λέξεις από το κείμενο.\n"
        "Κείμενο: {context}\nΕρώτηση: {question}\nΑπάντηση:",
        "ro": "Răspunde cu cuvinte din text.\nText: {context}\nÎntrebare: {question}\nRăspuns:",
        "pt": "Responda com palavras do texto.\nTexto: {context}\nPergunta: {question}\nResposta:",
        "id": "Jawab dengan kata-kata dari teks.\n"
        "Teks: {context}\nPertanyaan: {question}\nJawaban:",
        "bn": "লেখার শব্দ দিয়ে উত্তর দিন।\nলেখা: {context}\nপ্রশ্ন: {question}\nউত্তর:",
        "ur": "متن کے الفاظ میں جواب دیں۔\nمتن: {context}\nسوال: {question}\nجواب:",
        "am": "ከጽሑፉ በተወሰዱ ቃላት መልስ።\nጽሑፍ: {context}\nጥያቄ: {question}\nመልስ:",
        "ha": "Amsa da kalmomi daga rubutun.\nRubutu: {context}\nTambaya: {question}\nAmsa:",
        "so": "Ku jawaab erayo qoraalka ku jira.\nQoraal: {context}\nSu'aal: {question}\nJawaab:",
        "yo": "Fi ọ̀rọ̀ inú àyọkà dáhùn.\nÀyọkà: {context}\nÌbéèrè: {question}\nÌdáhùn:",
    }
)

SUMMARY_PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "en": "Summarize the text in one sentence.\nText: {article}\nSummary:",
        "ar": "لخّص النص في جملة واحدة.\nالنص: {article}\nالملخص:",
        "zh": "用一句话概括文章。\n文章：{article}\n摘要：",
        "sw": "Fupisha maandishi kwa sentensi moja.\nMaandishi: {article}\nMuhtasari:",
        "am": "ጽሑፉን በአንድ ዓረፍተ ነገር አጠቃልል።\nጽሑፍ: {article}\nማጠቃለያ:",
        "ha": "Taƙaita rubutun a jimla ɗaya.\nRubutu: {article}\nTaƙaitawa:",
        "so": "Qoraalka ku soo koob hal weedh.\nQoraal: {article}\nSoo koobid:",
        "yo": "Ṣe àkópọ̀ àyọkà náà ní gbólóhùn kan.\nÀyọkà: {article}\nÀkópọ̀:",
        "hi": "पाठ का सार एक वाक्य में लिखें।\nपाठ: {article}\nसार:",
        "bn": "লেখাটির সারসংক্ষেপ এক বাক্যে লিখুন।\nলেখা: {article}\nসারসংক্ষেপ:",
        "ur": "متن کا خلاصہ ایک جملے میں لکھیں۔\nمتن: {article}\nخلاصہ:",
        "th": "สรุปข้อความในหนึ่งประโยค\nข้อความ: {article}\nสรุป:",
        "tr": "Metni tek cümleyle özetle.\nMetin: {article}\nÖzet:",
        "ru": "Кратко изложи текст одним предложением.\nТекст: {article}\nКраткое изложение:",
        "es": "Resume el texto en una frase.\nTexto: {article}\nResumen:",
        "fr": "Résume le texte en une phrase.\nTexte : {article}\nRésumé :",
        "de": "Fasse den Text in einem Satz zusammen.\nText: {article}\nZusammenfassung:",
        "vi": "Tóm tắt văn bản trong một câu.\nVăn bản: {article}\nTóm tắt:",
        "id": "Ringkas teks ini dalam satu kalimat.\nTeks: {article}\nRingkasan:",
        "pt": "Resuma o texto em uma frase.\nTexto: {article}\nResumo:",
        "el": "Συνόψισε το κείμενο σε μία πρόταση.\nΚείμενο: {article}\nΠερίληψη:",
        "ro": "Rezumă textul într-o singură propoziție.\nText: {article}\nRezumat:",
    }
)

TEXT_PROMPTS: Mapping[str, str] = MappingProxyType({FALLBACK: "{prompt}"})
"""Template for examples whose prompt is already complete; it serves every language."""


def template_for(task: Task, language: str) -> tuple[str, str | None]:
    """Return (task's template for a language, notice if English replaces it or None).

    A code such as "pt-BR" uses the template of "pt" if it has none of its own. A task with one
    template for all languages gives no notice.
    """
    found = in_language(task.prompts, language)
    if found is not None:
        return found, None
    if len(task.prompts) == 1:
        return task.prompts[FALLBACK], None
    notice = (
        f"no built-in prompt for language {shown(language)} (there is one for "
        f"{', '.join(task.prompts)}); the English prompt is used, set data.*.prompt or --prompt "
        "to give your own"
    )
    return task.prompts[FALLBACK], notice


def template_fields(task: Task, template: str) -> tuple[str, ...]:
    """Return the fields that a template needs; the first one may be shortened.

    They are the task's fields. For a task without fields they are the names in braces, in order.

    Raises:
        ValueError: a field does not occur exactly once in the template.
    """
    names = task.fields or tuple(dict.fromkeys(_NAME.findall(template)))
    if not names:
        raise ValueError(
            f"the prompt template names no column, got {shown(template)}; write the name of each "
            "column it needs in braces, such as {prompt}"
        )
    for name in names:
        count = template.count(f"{{{name}}}")
        if count != 1:
            every = " and ".join(f"{{{name}}}" for name in names)
            raise ValueError(
                f"the prompt template holds {{{name}}} {count} times, got {shown(template)}; write "
                f"{every} exactly once{' each' if len(names) > 1 else ''}"
            )
    return names


def check_template(task: Task, template: str) -> None:
    """Check that a template can be rendered.

    Raises:
        ValueError: see `template_fields`.
    """
    template_fields(task, template)


def render(task: Task, example: Example, template: str | None = None) -> Prompt:
    """Return the prompt of an example; its body is the first field, which may be shortened.

    For a task without fields the body is the example's longest column. If the template consists of
    one column only, the body is empty: a complete prompt may end in its instruction, which must not
    be cut.

    Other braces in the template, and placeholders in the example's texts, stay unchanged.

    Args:
        task: task of the example.
        example: an example with the fields of the template.
        template: text with each field in braces; None means the task's template for the language.

    Raises:
        ValueError: the template lacks or repeats a field, or the example lacks one.
    """
    chosen = template_for(task, example.language)[0] if template is None else template
    names = template_fields(task, chosen)
    absent = [name for name in names if name not in example.fields]
    if absent:
        raise ValueError(
            f"row {shown(example.id)} has no {shown(absent[0])}, which the prompt needs; it has "
            f"{', '.join(example.fields) or 'no field'}"
        )
    if not task.fields:
        # A complete prompt has no part that may be cut. Otherwise the longest column is most likely
        # the text that the rest of the template refers to.
        if chosen.strip() == f"{{{names[0]}}}":
            return Prompt(prefix=_filled(chosen, example.fields, list(names)), body="", suffix="")
        names = tuple(sorted(names, key=lambda name: -len(example.fields[name])))
    body, *others = names
    before, after = chosen.split(f"{{{body}}}")
    return Prompt(
        prefix=_filled(before, example.fields, others),
        body=example.fields[body],
        suffix=_filled(after, example.fields, others),
    )


def _filled(text: str, fields: Mapping[str, str], names: list[str]) -> str:
    # One pass for all fields, since the text of one may contain the placeholder of another.
    return _NAME.sub(lambda found: fields[found[1]] if found[1] in names else found[0], text)
